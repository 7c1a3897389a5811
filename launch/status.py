"""How runs stand: from the files of their jobs and their heartbeats, with what Slurm's queue and accounting add."""

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from cxr_vae.console import clock
from cxr_vae.errors import UserError
from cxr_vae.heartbeat import STALE_AFTER_S, read_heartbeat
from cxr_vae.run_dir import RunDir
from launch import slurm_commands
from launch.records import Record, records_of

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")

OVER = ("done", "failed", "cancelled", "stopped", "vanished")
"""States from which nothing more comes by itself."""

ASK_EVERY_S = 15.0
"""How often Slurm is asked by one who watches: its controller has all users to answer."""


@dataclass(frozen=True)
class Status:
    """One job of a run. What isn't known is None."""

    run: str
    stage: str
    job: str
    state: str
    """waiting, running, stale, cancelling, done, failed, cancelled, stopped, vanished."""
    attempt: int
    step: int | None = None
    num_steps: int | None = None
    loss_nats: float | None = None
    images_per_s: float | None = None
    left_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    why: str = ""
    test_loss_nats: float | None = None


@dataclass(frozen=True)
class Views:
    """What can be seen from outside of the files; None where it doesn't answer."""

    queue: Mapping[str, slurm_commands.Queued] | None
    accounting: Mapping[str, str] | None


def look(records: Sequence[Record]) -> Views:
    """Asks squeue for the jobs that may go on, and sacct for those of them that squeue doesn't list."""
    jobs = in_slurm(records)
    if not jobs:
        return Views({}, {})
    queue = slurm_commands.queue({user for user in jobs.values() if user is not None})
    gone = [job for job in jobs if queue is not None and job not in queue]
    return Views(queue, slurm_commands.accounting(gone) if gone else {})


def in_slurm(records: Sequence[Record]) -> dict[str, str | None]:
    """The jobs that Slurm knows more of than the files, which say when one has ended; and whose they are."""
    known = ((record.job, record.facts()) for record in records if not record.end_of_job)
    return {job: facts.get("user") for job, facts in known if facts.get("cluster") == "slurm"}


@dataclass
class SeldomLook:
    """`look` for one who watches: asks Slurm only where the jobs are others than before, or after a while."""

    _jobs: Mapping[str, str | None] = field(default_factory=dict)
    _views: Views = Views({}, {})
    _asked: float = 0.0

    def __call__(self, records: Sequence[Record]) -> Views:
        """As it is, or was at the last time."""
        jobs = in_slurm(records)
        if jobs != self._jobs or time.monotonic() - self._asked > ASK_EVERY_S:
            self._jobs, self._views, self._asked = jobs, look(records), time.monotonic()
        return self._views


def runs_below(paths: Sequence[Path]) -> list[RunDir]:
    """The run directories among `paths` and below them; UserError where there are none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not there: name a run directory, or a folder of them")
        for candidate in [path, *sorted(path.glob("*/")), *sorted(path.glob("*/*/"))]:
            of_prior = candidate != path and candidate.parent.name == "priors"  # is shown as a stage of its run
            if is_run(candidate) and not of_prior:
                found[candidate] = None
    if not found:
        raise UserError(f"no run in {', '.join(map(str, paths))}: name a run directory, or a folder of them")
    return [RunDir(path) for path in found]


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run, or of one whose first job still waits."""
    run = RunDir(path)
    return run.config.is_file() or any(True for _ in records_of(run.jobs))


def statuses(runs: Sequence[RunDir], look: Callable[[Sequence[Record]], Views] = look) -> list[Status]:
    """A status for each job of each run, of several of one stage the last; a run without jobs has its heartbeat."""
    records = {run: newest_of_each_stage(run) for run in runs}
    views = look([record for of_run in records.values() for record in of_run])
    found = []
    for run in runs:
        found += [status_of(run, record, views) for record in records[run]] or [status_by_hand(run)]
    return found


def newest_of_each_stage(run: RunDir) -> list[Record]:
    """The record of the last job of each stage."""
    return list({record.stage: record for record in records_of(run.jobs)}.values())


def status_of(run: RunDir, record: Record, views: Views) -> Status:
    """How a job stands."""
    state, why = state_of(run, record, views)
    attempt = record.attempts[-1].number if record.attempts else 0
    loop = loop_of(run, record)
    training = of_training(loop) if loop else {}
    if state != "running":
        training |= {"images_per_s": None, "left_s": None}
    return Status(str(run.path), record.stage, record.job, state, attempt, why=why, **training)


def state_of(run: RunDir, record: Record, views: Views) -> tuple[str, str]:
    """The state of a job and why, from the best witness there is."""
    last, end = record.attempts[-1] if record.attempts else None, record.end_of_job
    if end is not None and end.outcome == "done":
        return "done", ""
    if end is not None:
        return (end.outcome if end.outcome in ("stopped", "cancelled") else "failed"), end.why
    if record.cancelled:
        return ("cancelling", "told to leave") if is_there(record, views) else ("cancelled", "")
    before = why_before(record)
    if record.facts().get("cluster") != "slurm":
        return state_here(run, record, before)
    queued = (views.queue or {}).get(record.job)
    if queued is not None and queued.state in WAITING:
        return "waiting", "; ".join(filter(None, [f"Slurm: {queued.reason}", before]))
    if queued is not None and queued.state != "COMPLETING":
        return state_of_running(run, record, before)
    if queued is not None:
        return "waiting", "it is being cleaned up"
    if views.queue is not None:
        return state_of_unlisted(run, record, views, before)
    if last is None or last.ended is not None:
        return "waiting", "Slurm's controller doesn't answer"
    state, why = state_of_running(run, record, before)
    return state, "; ".join(filter(None, ["Slurm's controller doesn't answer", why]))


def state_of_unlisted(run: RunDir, record: Record, views: Views, before: str) -> tuple[str, str]:
    """Of a job that squeue doesn't list, from accounting; there are clusters where it lists nobody else's jobs."""
    told = (views.accounting or {}).get(record.job, "").partition(" ")[0]
    says = f"Slurm's accounting says {told}"
    if told in ("RUNNING", "SUSPENDED"):
        return state_of_running(run, record, before)
    if told in WAITING:
        return "waiting", "; ".join(filter(None, [says, before]))
    if told == "COMPLETED":
        return "running", "it has just ended"
    if told == "CANCELLED":
        before_it = "" if record.attempts else ", perhaps since the stage before it didn't succeed"
        return "cancelled", f"cancelled through Slurm{before_it}"
    what = says if told else "Slurm knows nothing of it any more"
    return "vanished", f"not in the queue, and no rank of its last attempt left word; {what}: submit the same again"


def is_there(record: Record, views: Views) -> bool:
    """Whether the queue has the job, or this machine the process."""
    if record.facts().get("cluster") != "slurm":
        return record.process() is not None or record.facts().get("host") != socket.gethostname()
    return views.queue is None or record.job in views.queue


def state_here(run: RunDir, record: Record, before: str) -> tuple[str, str]:
    """Of a job on one machine, whose id is its process's."""
    if record.facts().get("host") != socket.gethostname():
        return state_of_running(run, record, before)
    if record.process() is not None:
        return state_of_running(run, record, before) if record.attempts else ("waiting", "for the stage before it")
    if not record.attempts and any(has_failed(other) for other in records_of(run.jobs) if same_process(other, record)):
        return "cancelled", "the stage before it didn't succeed"
    return "vanished", "its process is gone and left no word: start the same again"


def same_process(one: Record, other: Record) -> bool:
    """Whether one process runs both, as stages of a chain."""
    return (one.job, one.facts().get("process_began")) == (other.job, other.facts().get("process_began"))


def has_failed(record: Record) -> bool:
    """Whether a job has ended, and not well."""
    return record.end_of_job is not None and record.end_of_job.outcome != "done"


def state_of_running(run: RunDir, record: Record, before: str) -> tuple[str, str]:
    """A job that should be running is stale where its heartbeat is."""
    loop = loop_of(run, record)
    beat = read_heartbeat(loop.heartbeat) if loop else None
    if beat is None or not record.attempts or beat["time"] < record.attempts[-1].began:
        return "running", before
    return stale(beat) or ("running", before)


def stale(beat: Mapping[str, Any]) -> tuple[str, str] | None:
    """State and reason where a heartbeat is old."""
    if beat["age_s"] <= STALE_AFTER_S:
        return None
    return "stale", f"no sign of the loop for {clock(beat['age_s'])}, last on {beat['host']}"


def why_before(record: Record) -> str:
    """How the attempt before the running one ended."""
    earlier = [attempt for attempt in record.attempts if attempt is not record.attempts[-1] or attempt.ended]
    if not earlier:
        return ""
    last = earlier[-1]
    return f"attempt {last.number} {last.outcome}: {last.why}" if last.outcome else f"attempt {last.number} was cut off"


def status_by_hand(run: RunDir) -> Status:
    """Of a run that no launcher started."""
    beat = read_heartbeat(run.heartbeat)
    state, why = "unknown", "no heartbeat"
    if beat is not None:
        state = {"finished": "done", "stopped": "stopped"}.get(beat["state"], "running")
        why = beat.get("reason") or ""
        if state == "running":
            state, why = stale(beat) or (state, why)
    return Status(str(run.path), "train", "-", state, 0, why=why, **of_training(run))


def loop_of(run: RunDir, record: Record) -> RunDir | None:
    """Where a job's training loop is: the run, or the prior trained last since the job began; None without one."""
    if record.stage != "prior":
        return run if record.stage == "train" else None
    beats = [(beat["time"], loop) for loop in run.prior_trainings() if (beat := read_heartbeat(loop.heartbeat))]
    began = record.attempts[0].began if record.attempts else float("inf")
    return max((of for of in beats if of[0] >= began), key=itemgetter(0), default=(0.0, None))[1]


def of_training(run: RunDir) -> dict[str, Any]:
    """Of a run's heartbeat, checkpoints and epochs."""
    beat = read_heartbeat(run.heartbeat) or {}
    keys = ("step", "num_steps", "loss_nats", "test_loss_nats", "images_per_s", "left_s")
    known = {key: beat.get(key) for key in keys}
    newest = run.newest_step()
    saved = None
    for path in run.checkpoints.glob("step-*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: newer ones were written
            saved = max(saved or 0.0, path.stat().st_mtime)
    return known | {
        "checkpoint_step": newest or None,
        "checkpoint_age_s": None if saved is None else max(0.0, time.time() - saved),
    }


def table(found: Sequence[Status]) -> str:
    """One line a job; on a terminal the reason, the last column, is broken to what is left of its width."""
    from tabulate import tabulate

    headers = ["run", "stage", "job", "state", "try", "step", "loss", "img/s", "left", "checkpoint", "why"]
    rows = [list(cells(status)) for status in found]
    if not sys.stdout.isatty():
        return tabulate(rows, headers, disable_numparse=True)
    others = tabulate([row[:-1] for row in rows], headers[:-1], disable_numparse=True)
    room = shutil.get_terminal_size().columns - len(others.partition("\n")[0]) - 2
    widths = [None] * (len(headers) - 1) + [max(room, 20)]
    return tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths)


def cells(status: Status) -> Iterator[str]:
    """Of one line."""
    yield from (status.run, status.stage, status.job, status.state, str(status.attempt or ""))
    yield f"{status.step}/{status.num_steps}" if status.step is not None else ""
    yield f"{status.loss_nats:.1f}" if status.loss_nats is not None else ""
    yield f"{status.images_per_s:.0f}" if status.images_per_s else ""
    yield clock(status.left_s) if status.left_s is not None else ""
    saved = status.checkpoint_step is not None and status.checkpoint_age_s is not None
    yield f"{status.checkpoint_step}, {clock(status.checkpoint_age_s or 0)} ago" if saved else ""
    yield status.why


def running_job(run: RunDir, stage: str) -> Status | None:
    """The job of this stage that works on a run or waits to, if any: another must not be started."""
    for record in newest_of_each_stage(run):
        if record.stage == stage:
            status = status_of(run, record, look([record]))
            return status if status.state not in OVER else None
    return None
