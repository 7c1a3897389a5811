"""Where jobs run: this machine in the background (through submitit), or this terminal; for Slurm see `slurm_queue`."""

import contextlib
import getpass
import os
import shlex
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from cxr_vae.run_dir import git_revision
from cxr_vae.stopping import STOPPED_EXIT_CODE
from launch.records import Record
from launch.stages import Stage
from launch.starters import ALL, Here, Starter
from launch.supervisor import Supervisor

YEAR_MIN = 365 * 24 * 60


@dataclass(frozen=True)
class Job:
    """What submitit pickles and calls where the job is: stages one after another, until one doesn't succeed."""

    stages: tuple[Stage, ...]
    starter: Starter
    margin_s: float = 0.0
    """How long before the time limit the ranks may be told to stop."""
    keep_going: bool = False
    """After one that fails, too."""

    def __call__(self) -> None:
        """Ends the process with the exit code of the stage that failed, which Slurm then shows as the job's."""
        if isinstance(self.starter, Here):
            os.setsid()  # what a script's terminal sends to its processes is not for the job
        code = self.run()
        if code:
            sys.stdout.flush()
            os._exit(code)  # submitit would take SystemExit for success

    def run(self) -> int:
        """The exit code of the first stage that doesn't succeed, or 0."""
        first = 0
        for stage in self.stages:
            code = Supervisor(stage, self.starter, self.margin_s).run()
            first = first or code
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
class Inline(Cluster):
    """This terminal: returns when the last stage has ended, and Ctrl-C stops it."""

    name = "inline"

    def submit(self, stages: Sequence[Stage], facts: dict[str, Any]) -> int:
        """Runs them here."""
        for stage in stages:
            self.record(stage, str(os.getpid()), facts | process_facts(os.getpid()))
            print(f"\n── {stage.name} ──", flush=True)
            code = Job((stage,), Here(on_terminal=True)).run()
            if code:
                print(f"{stage.name} ended with exit code {code}", file=sys.stderr)
                return code
        return 0

    def submit_sweep(self, stages: Sequence[Stage], table: Stage, facts: dict[str, Any]) -> int:
        """One after another."""
        codes = []
        for stage in stages:
            codes.append(self.submit([stage], facts))
            if codes[-1] == STOPPED_EXIT_CODE:
                return STOPPED_EXIT_CODE
        return max(*codes, self.submit([table], facts))


@dataclass
class Local(Cluster):
    """This machine, in the background: returns at once, and the terminal may be closed."""

    name = "local"

    def submit(self, stages: Sequence[Stage], facts: dict[str, Any]) -> int:
        """One process for the chain."""
        return self._submit(stages, facts, keep_going=False)

    def submit_sweep(self, stages: Sequence[Stage], table: Stage, facts: dict[str, Any]) -> int:
        """One after another, in one process."""
        return self._submit([*stages, table], facts, keep_going=True)

    def _submit(self, stages: Sequence[Stage], facts: dict[str, Any], *, keep_going: bool) -> int:
        import submitit

        executor = submitit.LocalExecutor(stages[-1].run_dir.jobs / "submitit")
        executor.update_parameters(timeout_min=YEAR_MIN, stderr_to_stdout=True)
        starter = Here(cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", ALL))
        with detached():
            job = executor.submit(Job(tuple(stages), starter, keep_going=keep_going))
        facts |= process_facts(int(job.job_id))
        for stage in stages:
            self.record(stage, job.job_id, facts)
            print(f"{stage.name}: process {job.job_id}", flush=True)
        return 0


def process_facts(process: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number; see `records.Record.process`."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        return {"process_began": psutil.Process(process).create_time()}
    return {}


def as_typed(stage: Stage) -> str:
    """The command of a stage on one machine, as one would type it."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stage.num_ranks}"]
    return shlex.join([sys.executable, *(many if stage.num_ranks > 1 else []), "-m", "cxr_vae", *stage.arguments])


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """What is started meanwhile outlives this terminal: no signal of it, and nothing of it to read or write."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (0, 1, 2)]
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        yield
    finally:
        for stream, copy in enumerate(kept):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nothing)
        for number, handler in previous.items():
            signal.signal(number, handler)
