"""Where jobs run: Slurm's queue, this machine in the background, or this terminal; the first two through submitit."""

import contextlib
import getpass
import io
import os
import shlex
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cxr_vae.errors import UserError
from cxr_vae.run_dir import git_revision
from cxr_vae.stopping import STOPPED_EXIT_CODE
from launch import slurm_commands
from launch.profiles import Profile
from launch.records import Record
from launch.stages import Stage
from launch.starters import ALL, Here, InSlurm, Starter
from launch.supervisor import Supervisor

YEAR_MIN = 365 * 24 * 60

REPORT_MIN = 30
"""Time limit of a report, which takes seconds."""

USERS_OWN = ("account", "partition", "qos", "reservation", "constraint", "wckey")
"""Options that people set once for all, such as by SBATCH_ACCOUNT in their shell's start-up file."""

SETTLING_S = 1.5
"""Until a job that was just queued has a reason for waiting."""


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
        more |= {"requeue": True, "output": f"{stage.run_dir.logs.absolute()}/{stage.log_name}-job.log"}
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
        with submitting(stage, self.options):
            executor = self._executor(stage.run_dir.jobs / "submitit", self.parameters(stage, after))
            return str(executor.submit(self.job(stage)).job_id)

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
    time.sleep(SETTLING_S)
    queue = slurm_commands.queue() or {}
    for job in jobs:
        if job in queue and queue[job].may_wait_for_ever:
            print(
                f"warning: job {job} may wait for ever, Slurm says {queue[job].reason}: ask for less, or for another "
                f"partition; `scancel {job}` ends it",
                file=sys.stderr,
            )


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
