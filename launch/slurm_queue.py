"""Slurm's queue as a place where jobs run, through submitit."""

import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr_vae.errors import UserError
from launch import slurm_commands
from launch.clusters import Cluster, Job
from launch.profiles import Profile
from launch.stages import Stage
from launch.starters import InSlurm

REPORT_MIN = 30
"""Time limit of a report, which takes seconds."""

USERS_OWN = ("account", "partition", "qos", "reservation", "constraint", "wckey")
"""Options that people set once for all, such as by SBATCH_ACCOUNT in their shell's start-up file."""

SETTLING_S, LOOK_FOR_S = 1.5, 15.0
"""After which pauses it is looked, and for how long, whether a job that was just queued has a reason for waiting."""


@dataclass
class Slurm(Cluster):
    """Slurm's queue: returns when the jobs are queued, each waiting for the one before."""

    profile: Profile
    options: dict[str, Any]
    """Of sbatch, by long names; True for a bare one."""
    minutes: int
    gpu_options: dict[str, Any] = field(default_factory=dict)
    """Those of the stages that compute."""
    name = "slurm"

    def describe(self, stages: Sequence[Stage]) -> str:
        """The sbatch scripts and the srun that each runs."""
        after = [None, *(f"afterok:<job id of {stage.name}>" for stage in stages)]
        folders = [stage.run_dir.jobs / "submitit" for stage in stages]
        return "\n".join(map(self._script, stages, folders, map(self.parameters, stages, after)))

    def describe_sweep(self, stages: Sequence[Stage], table: Stage) -> str:
        """One script for all of the array, with the srun of its first task, and that of the table."""
        folder, parameters = table.run_dir.jobs / "submitit", self.sweep_parameters(stages, table)
        last = self.parameters(table, "afterany:<job id of the array>")
        return "\n".join(
            [
                self._script(stages[0], folder, parameters | {"map_count": len(stages)}),
                *("# the other tasks: " + shlex.join(["cxr-vae", *stage.arguments]) for stage in stages[1:]),
                "\n" + self._script(table, folder, last),
            ]
        )

    def _script(self, stage: Stage, folder: Path, parameters: dict[str, Any]) -> str:
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        script = _make_sbatch_string(command=command, folder=folder, **parameters)
        srun = self.starter.command(stage, Path("<record>"), "<first node>", "<port>")
        return f"# {stage.name}\n{script}\n# … which runs on the nodes\n#   {shlex.join(srun)}\n"

    def submit(self, stages: Sequence[Stage], facts: dict[str, Any]) -> int:
        """Queues the chain."""
        after: str | None = None
        queued: dict[str, Stage] = {}
        with all_or_nothing(queued):
            for stage in stages:
                job = self.submit_one(stage, after)
                queued[job] = stage
                after = f"afterok:{job}"
        for job, stage in queued.items():
            self.record(stage, job, facts)
            print(f"{stage.name}: job {job}", flush=True)
        warn_of_waiting(list(queued))
        return 0

    def submit_sweep(self, stages: Sequence[Stage], table: Stage, facts: dict[str, Any]) -> int:
        """A job array, and a job for the table that waits until all of it has ended."""
        executor = self._executor(table.run_dir.jobs / "submitit", self.sweep_parameters(stages, table))
        jobs = []
        with submitting(stages[0], self.options), executor.batch():
            jobs += [executor.submit(self.job(stage)) for stage in stages]
        array = jobs[0].job_id.partition("_")[0]
        with all_or_nothing([array]):
            last = self.submit_one(table, f"afterany:{array}")
        for stage, job in zip(stages, jobs, strict=True):
            self.record(stage, job.job_id, facts)
            print(f"{stage.run}: job {job.job_id}", flush=True)
        self.record(table, last, facts)
        print(f"{table.name}: job {last}", flush=True)
        warn_of_waiting([job.job_id for job in jobs])
        return 0

    def job(self, stage: Stage) -> Job:
        """What the queued job runs."""
        margin = min(self.profile.signal_delay_s + 60, 45 * self.minutes)  # Slurm signals up to a minute early
        return Job((stage,), self.starter, margin)

    @property
    def starter(self) -> InSlurm:
        """Of the ranks, as the profile says."""
        return InSlurm(tuple(os.path.expandvars(word) for word in self.profile.python), tuple(self.profile.srun))

    def parameters(self, stage: Stage, after: str | None) -> dict[str, Any]:
        """Of submitit's SlurmExecutor."""
        more = self.options | (self.gpu_options if stage.name in ("train", "prior", "evaluate") else {})
        more = {key.replace("-", "_"): value for key, value in more.items()}  # in place of submitit's, not beside them
        # A job may come back after it was cut off, into the same log.
        more |= {"requeue": True, "output": str(stage.job_log)}
        if after:
            more |= {"dependency": after, "kill-on-invalid-dep": "yes"}
        return {
            "job_name": f"{stage.run.name}-{stage.name}",
            "nodes": stage.nodes,
            "ntasks_per_node": stage.ranks_per_node,
            "cpus_per_task": stage.cpus_per_rank,
            "time": min(self.minutes, REPORT_MIN) if stage.name == "report" else self.minutes,
            "signal_delay_s": self.profile.signal_delay_s,
            "stderr_to_stdout": True,
            # Slurm signals the ranks; what is for the batch shell alone must not end the supervisor below it.
            "setup": ["trap : USR1 USR2 TERM", *self.profile.setup],
            "use_srun": False,  # the supervisor runs srun
            "wckey": None,  # submitit's own is refused where wckeys are enforced
            "additional_parameters": more,
        }

    def sweep_parameters(self, stages: Sequence[Stage], table: Stage) -> dict[str, Any]:
        """The same of the array, whose tasks have the size of the first one's."""
        parameters = self.parameters(stages[0], None)
        log = table.run_dir.logs.absolute() / f"{table.run.name}-train-%A_%a-job.log"
        more = parameters["additional_parameters"] | {"output": str(log)}
        return parameters | {"job_name": f"{table.run.name}-train", "additional_parameters": more}

    def submit_one(self, stage: Stage, after: str | None = None) -> str:
        """Queues one job; returns its id."""
        return self.queue(self.job(stage), stage, self.parameters(stage, after))

    def queue(self, work: Callable[[], None], stage: Stage, parameters: dict[str, Any]) -> str:
        """Queues a job of a stage, which calls `work` there; returns its id."""
        with submitting(stage, self.options):
            executor = self._executor(stage.run_dir.jobs / "submitit", parameters)
            return str(executor.submit(work).job_id)

    def _executor(self, folder: Path, parameters: dict[str, Any]) -> Any:
        import submitit

        if not slurm_commands.controller_answers():
            raise UserError("no Slurm controller answers here: run this on a login node, or use --cluster local")
        Path(parameters["additional_parameters"]["output"]).parent.mkdir(parents=True, exist_ok=True)
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(**parameters)
        return executor


@contextlib.contextmanager
def all_or_nothing(queued: Collection[str]) -> Iterator[None]:
    """Cancels the jobs that are queued by then where the next is refused."""
    try:
        yield
    except BaseException:
        if queued:
            slurm_commands.cancel(list(queued))
        raise


@contextlib.contextmanager
def submitting(stage: Stage, options: Mapping[str, Any]) -> Iterator[None]:
    """What Slurm refuses is told as Slurm says it; the job's surroundings are not those of a job we are in.

    Of the user's own settings those remain that `options` don't say: Slurm would prefer them to the script's.
    """
    import submitit

    kept = {"SLURM_CONF", "SLURM_CLUSTERS", *(f"SBATCH_{key.upper()}" for key in USERS_OWN if key not in options)}
    inside = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith(inside) and key not in kept}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error holds
            yield
    except submitit.core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or str(error).splitlines()
        raise UserError(f"Slurm refuses the {stage.name} job: {' '.join(line.strip() for line in lines)}") from None
    finally:
        os.environ.update(hidden)


def warn_of_waiting(jobs: Sequence[str]) -> None:
    """Says so where Slurm would let a job wait for ever, with its own reason."""
    deadline = time.monotonic() + LOOK_FOR_S
    while True:
        time.sleep(SETTLING_S)
        answer = slurm_commands.queue()
        queue = answer or {}
        unsettled = any(queue[job].state == "PENDING" and queue[job].reason == "None" for job in jobs if job in queue)
        if (answer is not None and not unsettled) or time.monotonic() > deadline:
            break
    for job in jobs:
        if job in queue and queue[job].may_wait_for_ever:
            print(
                f"warning: job {job} may wait for ever, Slurm says {queue[job].reason}: ask for less, or for another "
                f"partition; `scancel {job}` ends it",
                file=sys.stderr,
            )
