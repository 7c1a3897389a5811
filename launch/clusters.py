"""Where jobs run: this machine, or Slurm; both through submitit."""

import os
import shlex
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cxr_vae.config import ResourcesConfig
from cxr_vae.errors import UserError
from launch.stages import Stage

POLL_SECONDS = 0.2


class Cluster(ABC):
    """Runs stages one after another, each only if the one before succeeded."""

    @abstractmethod
    def describe(self, stages: Sequence[Stage]) -> str:
        """What `run` would start: commands or sbatch scripts."""

    @abstractmethod
    def run(self, stages: Sequence[Stage]) -> int:
        """Starts the stages; returns an exit code."""


@dataclass
class Local(Cluster):
    """Jobs on this machine, whose output appears on this terminal; returns when the last has ended."""

    folder: Path
    resources: ResourcesConfig
    interrupted: bool = False

    def describe(self, stages: Sequence[Stage]) -> str:
        """The commands, which could be typed as well."""
        return "\n".join(shlex.join(stage.command(stage.processes or 1)) for stage in stages)

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs each stage as a submitit job; stops at the first that fails and returns its exit code."""
        import submitit

        if self.resources.nodes > 1:
            raise UserError(f"resources.nodes={self.resources.nodes}: this is one machine; --cluster slurm has several")
        executor = submitit.LocalExecutor(self.folder)
        executor.update_parameters(timeout_min=self.resources.hours * 60, stderr_to_stdout=True)
        for stage in stages:
            print(f"\n── {stage.name} ──", flush=True)
            with _ignored(signal.SIGINT):  # Ctrl-C is for the stage, not for the processes submitit puts around it
                job = executor.submit(replace(stage, launcher=os.getpid()))
            code = self._follow(job)
            if code:
                how = "was interrupted" if self.interrupted else f"ended with exit code {code}"
                print(f"{stage.name} {how}; its log: {job.paths.stdout}", file=sys.stderr)
                return code
        return 0

    def _follow(self, job: Any) -> int:
        """Prints the job's log as it grows until the job has ended; returns its exit code."""
        log = Tail(job.paths.stdout)
        while not job.done():
            log.print_new()
            try:
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                self.interrupted = True
                print("interrupted: the stage saves what it has and leaves", file=sys.stderr, flush=True)
        log.print_new()
        return 1 if job.exception() else int(job.result())


@dataclass
class Slurm(Cluster):
    """Jobs in Slurm's queue, each waiting for the one before; returns when they are queued."""

    folder: Path
    resources: ResourcesConfig
    sbatch: Mapping[str, str]
    """Further sbatch parameters, such as partition and account."""

    def describe(self, stages: Sequence[Stage]) -> str:
        """The sbatch scripts; of a dependency, the job id is known only when the job before is queued."""
        from submitit.slurm.slurm import _make_sbatch_string

        scripts = []
        for number, stage in enumerate(stages):
            after = f"<job id of {stages[number - 1].name}>" if number else None
            command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
            script = _make_sbatch_string(command=command, folder=self.folder, **self.parameters(stage, after))
            scripts.append(f"# {stage.name}: cxr-vae {shlex.join(stage.arguments)}\n{script}")
        return "\n".join(scripts)

    def run(self, stages: Sequence[Stage]) -> int:
        """Queues the stages and says under which job ids."""
        import submitit

        if shutil.which("sbatch") is None:
            raise UserError("there is no sbatch on this machine: run this on a login node, or use --cluster local")
        after = None
        for stage in stages:
            executor = submitit.SlurmExecutor(self.folder)
            executor.update_parameters(**self.parameters(stage, after))
            try:
                job = executor.submit(stage)
            except submitit.core.utils.FailedJobError as error:
                raise UserError(f"Slurm refuses the {stage.name} job: {str(error).strip().splitlines()[-1]}") from None
            print(f"{stage.name}: job {job.job_id}, log {job.paths.stdout}", flush=True)
            after = job.job_id
        return 0

    def parameters(self, stage: Stage, after: str | None) -> dict[str, Any]:
        """Of submitit's SlurmExecutor: one task a rank; sharding is one task with all the cores."""
        resources = self.resources
        ranks = resources.processes_per_node or resources.gpus_per_node or 1
        alone = stage.name == "shard"
        tasks, cpus = (1, ranks * resources.cpus_per_process) if alone else (ranks, resources.cpus_per_process)
        parameters: dict[str, Any] = {
            "job_name": f"cxr-{stage.name}",
            "nodes": resources.nodes if stage.name == "train" else 1,
            "ntasks_per_node": tasks,
            "cpus_per_task": cpus,
            "time": round(resources.hours * 60),
            "stderr_to_stdout": True,
            # From Slurm 22.05 on srun doesn't take over --cpus-per-task; one dead rank ends the others.
            "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
            "additional_parameters": dict(self.sbatch),
        }
        if resources.gpus_per_node and not alone:
            parameters["gpus_per_node"] = resources.gpus_per_node
        if resources.memory_gb:
            parameters["mem"] = f"{resources.memory_gb}GB"
        if after:
            parameters["dependency"] = f"afterok:{after}"
            parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
        return parameters


@contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    """A signal is ignored meanwhile, and by the processes started meanwhile."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)


@dataclass
class Tail:
    """A log file that grows while it is read."""

    path: Path
    position: int = 0
    rest: str = field(default="", repr=False)

    def print_new(self) -> None:
        """Prints the whole lines that came since the last call, without submitit's own."""
        if not self.path.is_file():
            return
        with self.path.open(errors="replace") as file:
            file.seek(self.position)
            text = self.rest + file.read()
            self.position = file.tell()
        *lines, self.rest = text.split("\n")
        for line in lines:
            if not line.startswith("submitit "):
                print(line, flush=True)
