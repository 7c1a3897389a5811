"""Where jobs run: this machine, in the background or in this terminal; for Slurm see `slurm_queue`."""

import contextlib
import getpass
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cxr_vae.run_dir import git_revision
from cxr_vae.stopping import SIGNALS, STOPPED_EXIT_CODE
from launch.records import Record
from launch.stages import Stage
from launch.starters import Here, Starter
from launch.supervisor import Supervisor


@dataclass(frozen=True)
class Job:
    """What is pickled and called where the job is: stages one after another, until one doesn't succeed."""

    stages: tuple[Stage, ...]
    starter: Starter
    margin_s: float = 0.0
    """How long before the time limit the ranks may be told to stop."""
    keep_going: bool = False
    """After one that fails, too."""

    def __call__(self) -> None:
        """Ends the process with the exit code of the stage that failed, which Slurm then shows as the job's."""
        if isinstance(self.starter, Here):
            for number in SIGNALS:
                signal.signal(number, lambda *_: None)  # between two stages there is nobody to be told
        code = self.run()
        if code:
            sys.stdout.flush()
            os._exit(code)  # submitit would take SystemExit for success

    def run(self) -> int:
        """The exit code of the first stage that doesn't succeed, or 0; in a terminal, of the one that Ctrl-C met."""
        first, on_terminal = 0, self.starter.on_terminal
        for place, stage in enumerate(self.stages, start=1):
            if isinstance(self.starter, Here) and not on_terminal:
                print_into(stage.job_log)  # which Slurm does for its jobs
            code = Supervisor(stage, self.starter, self.margin_s).run()
            first = first or code
            if code and on_terminal:
                print(f"{stage.name} ended with exit code {code}", file=sys.stderr)
            if on_terminal and code == STOPPED_EXIT_CODE:
                for later in self.stages[place:]:
                    Record(later.record_path(self.starter.job)).mark_cancelled()
                return code
            if code and not self.keep_going:
                break
        return first


class Cluster(ABC):
    """Takes chains of stages, in which each waits for the success of the one before."""

    name = ""

    def describe(self, stages: Sequence[Stage]) -> str:
        """What `submit` would submit, word for word as far as it can be known before; here what could be typed."""
        return "\n".join(as_typed(stage) for stage in stages)

    def describe_sweep(self, stages: Sequence[Stage], table: Stage) -> str:
        """The same of `submit_sweep`."""
        return self.describe([*stages, table])

    @abstractmethod
    def submit(self, stages: Sequence[Stage], facts: dict[str, Any]) -> int:
        """Starts a chain and says where it is; returns an exit code."""

    @abstractmethod
    def submit_sweep(self, stages: Sequence[Stage], table: Stage, facts: dict[str, Any]) -> int:
        """Starts stages that don't depend on one another, and after all of them, however they end, `table`."""

    def record(self, stage: Stage, job: str, facts: dict[str, Any]) -> Record:
        """Notes what was submitted, for `status` and for people who look years later."""
        record = Record(stage.record_path(job))
        who = {"user": getpass.getuser(), "host": socket.gethostname(), "git": git_revision(), "python": sys.executable}
        what = {"nodes": stage.nodes, "ranks": stage.num_ranks, "arguments": ["cxr-vae", *stage.arguments]}
        record.submitted({"cluster": self.name, "job": job, "stage": stage.name} | what | who | facts)
        return record


@dataclass
class ThisMachine(Cluster):
    """One stage after another: `inline` in this terminal, until the last has ended; `local` in the background."""

    name: str

    def submit(self, stages: Sequence[Stage], facts: dict[str, Any]) -> int:
        """Until one doesn't succeed."""
        return self._start(Job(tuple(stages), self._starter), facts)

    def submit_sweep(self, stages: Sequence[Stage], table: Stage, facts: dict[str, Any]) -> int:
        """All of them, however they end; in a terminal until Ctrl-C."""
        return self._start(Job((*stages, table), self._starter, keep_going=True), facts)

    @property
    def _starter(self) -> Here:
        return Here(on_terminal=self.name == "inline")

    def _start(self, job: Job, facts: dict[str, Any]) -> int:
        process = os.getpid() if self.name == "inline" else in_background(job)
        facts |= process_facts(process)
        for stage in job.stages:
            self.record(stage, str(process), facts)
            if self.name == "local":
                print(f"{stage.name}: process {process}", flush=True)
        return job.run() if self.name == "inline" else 0


def in_background(job: Job) -> int:
    """The process that runs a job, in a session of its own: this terminal's signals and pipes are not for it."""
    code = "import pickle, sys; pickle.load(sys.stdin.buffer)()"
    call = [sys.executable, "-u", "-c", code, str(job.stages[0].run)]  # the last for whoever looks at `ps`
    log = job.stages[0].job_log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True)
    assert process.stdin is not None
    with process.stdin as pipe:
        pickle.dump(job, pipe)
    return process.pid


def print_into(log: Path) -> None:
    """From now on all that this process prints, after what is there."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def process_facts(process: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number; see `records.Record.process`."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        return {"process_began": psutil.Process(process).create_time()}
    return {}


def as_typed(stage: Stage) -> str:
    """The command of a stage on one machine, as one would type it."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stage.num_ranks}"]
    return shlex.join([sys.executable, *(many if stage.num_ranks > 1 else []), "-m", "cxr_vae", *stage.arguments])
