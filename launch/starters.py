"""How the ranks of a stage are started where a job is: by srun on the job's nodes, or on this machine."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import launch
from launch import slurm_commands
from launch.stages import Stage

Processes = Sequence["subprocess.Popen[bytes]"]

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that must not come from wherever the job was submitted."""

POLL_S = 0.2

LOOK_EVERY_S = 10.0
"""How often the words of the ranks are read while srun goes on."""

SRUN_PATIENCE_S = 90.0
"""How long srun may take to end the other ranks; Slurm's own KillWait is 30 s."""

PATIENCE_S = 60.0
"""How long the other ranks on this machine may take to leave when one has failed."""


class Starter(ABC):
    """Starts the ranks of a stage, each in a process of `launch.rank`."""

    can_requeue = False
    """Whether the job can go back into a queue."""
    on_terminal = False
    """Whether a person watches what the ranks print."""

    @property
    @abstractmethod
    def job(self) -> str:
        """The id of this job."""

    @property
    def allocation(self) -> int:
        """How often the job was started before this time."""
        return 0

    @abstractmethod
    def start(self, stage: Stage, ends: Path) -> Processes:
        """Starts the ranks, which leave their ends in the folder `ends` and print into the run's logs."""

    @abstractmethod
    def wait(self, processes: Processes, has_failed: Callable[[], bool]) -> list[int]:
        """Exit codes, when all have ended; one that ends badly takes the others along.

        Without exit codes: they don't end although a rank, as `has_failed` says from its own word, ended badly.
        """

    def stop(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Passes on that the ranks are to stop."""
        process.send_signal(number)

    def left_s(self) -> float | None:
        """Until the time limit; None: no limit, or not known."""
        return None

    def is_cancelled(self) -> bool:
        """Whether whoever runs the queue has ended the job for good."""
        return False

    def requeue(self) -> str | None:
        """Puts the job back into the queue; None, or why that didn't work."""
        raise NotImplementedError


@dataclass
class Here(Starter):
    """All ranks on this machine. On a terminal they print there, else each into its own log."""

    on_terminal: bool = False

    @property
    def job(self) -> str:
        """The process, since there is no queue."""
        return str(os.getpid())

    def start(self, stage: Stage, ends: Path) -> Processes:
        """One process a rank."""
        command = rank_command([sys.executable], stage, ends.absolute(), "127.0.0.1", free_port())
        processes = []
        for rank in range(stage.num_ranks):
            who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(stage.num_ranks)}
            with contextlib.ExitStack() as stack:
                log = None
                if not self.on_terminal:
                    path = stage.run_dir.logs / f"{stage.log_name}-{socket.gethostname()}-rank{rank}.log"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    log = stack.enter_context(path.open("ab"))
                both = subprocess.STDOUT if log else None
                # In a session of its own: Ctrl-C comes once, from us, and at the worst all of it is killed together.
                call = subprocess.Popen(command, env=os.environ | who, stdout=log, stderr=both, start_new_session=True)
                processes.append(call)
        return processes

    def wait(self, processes: Processes, has_failed: Callable[[], bool]) -> list[int]:
        """Polls them: there are few."""
        deadline = None
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            if deadline is None and any(process.poll() for process in processes):
                deadline = time.monotonic() + PATIENCE_S
            if deadline is not None and time.monotonic() > deadline:
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return [process.wait() for process in processes]


@dataclass
class InSlurm(Starter):
    """One srun on all nodes of the Slurm job this process is in."""

    python: tuple[str, ...] = ()
    """Command of the Python that the ranks run in, such as that of a container; empty: this one."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""
    can_requeue = True

    @property
    def job(self) -> str:
        """As squeue shows it."""
        return slurm_commands.job_id()

    @property
    def allocation(self) -> int:
        """As Slurm counts."""
        return int(os.environ.get("SLURM_RESTART_COUNT", 0))

    def start(self, stage: Stage, ends: Path) -> Processes:
        """Starts srun; one rank that ends badly ends the others."""
        stage.run_dir.logs.mkdir(parents=True, exist_ok=True)
        command = self.command(stage, ends.absolute(), own_address(), free_port())
        return [subprocess.Popen(command, env=self.environment())]

    def environment(self) -> dict[str, str]:
        """Of srun."""
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        checkout = Path(launch.__file__).parents[1]
        if self.python and (checkout / "pyproject.toml").is_file():  # a container has its packages, but not this code
            environment["PYTHONPATH"] = str(checkout)
        return environment

    def command(self, stage: Stage, ends: Path, address: str, port: int | str) -> list[str]:
        """The srun command line."""
        logs = f"--output={stage.run_dir.logs.absolute()}/{stage.log_name}-%N-rank%t.log"
        placed = self.placed(stage, "--kill-on-bad-exit=1", "--unbuffered", "--open-mode=append", logs)
        return [*placed, *rank_command(self.python or [sys.executable], stage, ends, address, port)]

    def placed(self, stage: Stage, *options: str) -> list[str]:
        """An srun with the size of a stage, up to what it starts."""
        return [
            *("srun", "--export=ALL"),
            *(f"--nodes={stage.nodes}", f"--ntasks={stage.num_ranks}", f"--ntasks-per-node={stage.ranks_per_node}"),
            f"--cpus-per-task={stage.cpus_per_rank}",  # from Slurm 22.05 on it is not taken over from the job
            *options,
            *self.srun,
        ]

    def wait(self, processes: Processes, has_failed: Callable[[], bool]) -> list[int]:
        """Until srun has ended, which it doesn't by itself where a node was started anew behind Slurm's back."""
        deadline, looked = None, time.monotonic()
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            if deadline is None and time.monotonic() - looked > LOOK_EVERY_S:
                looked = time.monotonic()
                deadline = looked + SRUN_PATIENCE_S if has_failed() else None
            if deadline is not None and time.monotonic() > deadline:
                return []
        return [process.wait() for process in processes]

    def stop(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Through srun, which passes USR2 on, but takes TERM for an order to kill."""
        process.send_signal(signal.SIGUSR2)

    def left_s(self) -> float | None:
        """As squeue says."""
        jobs = slurm_commands.queue()
        return jobs[self.job].left_s if jobs and self.job in jobs else None

    def is_cancelled(self) -> bool:
        """Whether someone has used scancel."""
        return slurm_commands.is_cancelled(slurm_commands.job_fields(self.job), self.allocation)

    def requeue(self) -> str | None:
        """Through scontrol."""
        return slurm_commands.requeue(self.job, self.allocation)


def rank_command(python: Sequence[str], stage: Stage, ends: Path, address: str, port: int | str) -> list[str]:
    """What each rank is started with."""
    whose = [str(ends), address, str(port), str(stage.ranks_per_node), str(stage.cpus_per_rank)]
    return [*python, "-u", "-m", "launch.rank", *whose, *stage.arguments]


def own_address() -> str:
    """Of this machine, the first of the job, where rank 0 is: its name if that resolves, else what Slurm says."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    with contextlib.suppress(OSError):
        socket.getaddrinfo(name, None, socket.AF_INET)
        return name
    answer = slurm_commands.ask("scontrol", "show", "node", "--oneliner", name) or ""
    fields = dict(field.partition("=")[::2] for field in answer.split())
    return fields.get("NodeAddr", name)


def free_port() -> int:
    """A port that nobody here listens on, outside of the range from which Linux takes those of connections."""
    first = secrets.randbelow(12000)  # not by the process's number: in containers that share a network they are alike
    for number in range(12000):
        port = 20000 + (first + number * 31) % 12000
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")
