"""What is known of a job, in files of its run: what was asked for, each attempt, and each rank's end.

`run_dir/jobs/<stage>-<job id>-<token>/` holds `job.json`, written when the job is submitted; `attempts.jsonl`, a line
at the beginning and the end of each attempt; `ranks/<attempt>/<rank>.json`, which every rank writes for itself; and
`cancelled`, once someone wants it to end. They are small, plain and tell how a job stands without asking Slurm.
"""

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cxr_vae.files import write_json


@dataclass(frozen=True)
class RankEnd:
    """How a rank of an attempt ended; `code` is None for one that began and left no word."""

    rank: int
    host: str
    code: int | None
    time: float


@dataclass
class Attempt:
    """One attempt at a stage, from the files."""

    number: int
    began: float
    host: str
    progress: int
    """When it began: steps, tars or files."""
    allocation: int
    """How often Slurm had started the job before: attempts of one allocation follow one another without the queue."""
    ended: float | None = None
    outcome: str | None = None
    """done, mistake, stopped, cancelled, crashed or lost; None: it runs, or ended without a word."""
    why: str = ""
    progress_at_end: int | None = None
    next: str = ""
    """again, requeue, or end; and then the job has ended."""

    @property
    def advanced(self) -> bool:
        """Whether it brought the stage on."""
        return self.progress_at_end is not None and self.progress_at_end > self.progress


@dataclass
class Record:
    """The files of one job. What can't be written, on a full disk, is kept in memory."""

    path: Path
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """With the attempts so far."""
        record = cls(path)
        with contextlib.suppress(OSError):
            for line in (path / "attempts.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a line that a crash cut short
                    record._take(json.loads(line))
        return record

    @property
    def stage(self) -> str:
        """`train`."""
        return self.path.name.partition("-")[0]

    @property
    def job(self) -> str:
        """`1202` or, of an array, `1202_3`."""
        return self.path.name.split("-")[1]

    def facts(self) -> dict[str, Any]:
        """What was asked for; empty where the job was started by other means."""
        try:
            facts: dict[str, Any] = json.loads((self.path / "job.json").read_text())
        except (OSError, ValueError):
            return {}
        return facts

    def process(self) -> psutil.Process | None:
        """Of a job without a queue, if it still lives on this machine; never another that has its number by now."""
        facts = self.facts()
        with contextlib.suppress(psutil.Error, KeyError, ValueError):
            found = psutil.Process(int(self.job))
            ours = facts["host"] == socket.gethostname() and abs(found.create_time() - facts["process_began"]) < 1
            if ours and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None

    def submitted(self, facts: Mapping[str, Any]) -> None:
        """Writes what was asked for."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "job.json", {**facts, "submitted": time.time()})

    def begin(self, host: str, progress: int, allocation: int) -> Attempt:
        """A new attempt."""
        number = self.attempts[-1].number + 1 if self.attempts else 1
        began = {"attempt": number, "began": time.time(), "host": host}
        self._add(began | {"progress": progress, "allocation": allocation})
        with contextlib.suppress(OSError):
            self.ranks(number).mkdir(parents=True, exist_ok=True)
        return self.attempts[-1]

    def end(self, outcome: str, why: str, progress: int, following: str) -> None:
        """The end of the last attempt, and what follows."""
        number = self.attempts[-1].number
        ended = {"attempt": number, "ended": time.time(), "outcome": outcome, "why": why}
        self._add({**ended, "progress": progress, "next": following})
        shutil.rmtree(self.ranks(number), ignore_errors=True)

    def ranks(self, attempt: int) -> Path:
        """Where the ranks of an attempt leave their ends."""
        return self.path / "ranks" / str(attempt)

    def rank_ends(self, attempt: int, num_ranks: int) -> list[RankEnd]:
        """In the order of time; those that never began are missing."""
        ends = []
        for rank in range(num_ranks):  # by name: a listing may be older than its files on a network file system
            with contextlib.suppress(OSError, ValueError, TypeError):
                ends.append(RankEnd(**json.loads((self.ranks(attempt) / f"{rank}.json").read_text())))
        return sorted(ends, key=lambda end: end.time)

    @property
    def end_of_job(self) -> Attempt | None:
        """The last attempt where nothing follows it; None where the files don't say that the job has ended."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].next == "end" else None

    @property
    def cancelled(self) -> bool:
        """Whether someone wants it to end for good."""
        return (self.path / "cancelled").exists()

    def mark_cancelled(self) -> None:
        """Before anything is signalled, so that the job's end is not taken for one to be mended."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "cancelled").touch()

    def _add(self, event: dict[str, Any]) -> None:
        self._take(event)
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "attempts.jsonl").open("a") as file:
                file.write("\n" + json.dumps(event) + "\n")  # behind a line that a crash cut short, too

    def _take(self, event: dict[str, Any]) -> None:
        if "began" in event:
            self.attempts.append(
                Attempt(event["attempt"], event["began"], event["host"], event["progress"], event["allocation"])
            )
        elif self.attempts and self.attempts[-1].number == event["attempt"]:
            last = self.attempts[-1]
            last.ended, last.outcome, last.why = event["ended"], event["outcome"], event["why"]
            last.progress_at_end, last.next = event["progress"], event["next"]


def records_of(jobs: Path) -> Iterator[Record]:
    """Those of a run's `jobs` directory, in the order of submission."""
    found = [path for path in jobs.iterdir() if path.is_dir() and "-" in path.name] if jobs.is_dir() else []
    records = [Record.read(path) for path in found]
    yield from sorted(records, key=lambda record: record.facts().get("submitted") or record.path.stat().st_mtime)
