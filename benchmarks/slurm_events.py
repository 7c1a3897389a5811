"""A run in Slurm's queue, what can be done to it, and what it costs it: for benchmarks/slurm_chaos.py."""

import contextlib
import json
import os
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launch.records import Record, records_of

HANG_S = 900.0


def run(*command: str, check: bool = True) -> str:
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        busy = done.returncode and "timed out" in done.stderr  # the controller, on a busy machine
        if not busy or command[0] == "sbatch":
            break
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def local_cluster(*arguments: str) -> str:
    return run("slurm/local_cluster", *arguments)


@dataclass
class Trial:
    """A run in the queue, and what can be done to it."""

    run_dir: Path
    nodes: int
    ranks: int
    rng: random.Random
    job: str = ""
    log: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    """Of each event: steps lost, seconds until it trained again."""

    # What is seen from outside.

    @property
    def record(self) -> Record:
        return next(iter(records_of(self.run_dir / "jobs")))

    def last_step(self) -> int:
        """Of metrics.jsonl, from its end."""
        with contextlib.suppress(OSError), (self.run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            for line in reversed(file.read().split(b"\n")):
                with contextlib.suppress(ValueError, KeyError):
                    return int(json.loads(line)["step"])
        return 0

    def began(self) -> float:
        """When the attempt that trains now had loaded its checkpoint."""
        with contextlib.suppress(OSError):
            return (self.run_dir / "environment.json").stat().st_mtime
        return 0.0

    def processes(self, what: str) -> list[psutil.Process]:
        """Of the run: those of Python that have `what` among their arguments."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if what in words and words[0] != "srun" and any(str(self.run_dir) in word for word in words):
                found.append(process)
        return found

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = HANG_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s; {run('squeue', '--all', check=False)}")
            time.sleep(0.05)

    # The events. Each does something to the job; what has to be put right afterwards comes after the `yield`.

    def scontrol_requeue(self) -> Iterator[None]:
        run("scontrol", "requeue", self.job)
        yield

    def scancel_usr2(self) -> Iterator[None]:
        run("scancel", "--signal=USR2", self.job)
        yield

    def rank_killed(self) -> Iterator[None]:
        self.rng.choice(self.processes("cxr_vae")).kill()
        yield

    def task_killed(self) -> Iterator[None]:
        """The process Slurm knows, which holds the rank, with its rank."""
        task = self.rng.choice(self.processes("launch.rank"))
        for process in [*task.children(), task]:
            process.kill()
        yield

    def preempted(self) -> Iterator[None]:
        other = run("sbatch", "--parsable", "-pmain", f"-N{self.nodes}", "--exclusive", "-o/dev/null", "--wrap=sleep 3")
        self.wait("preemption", lambda: other.strip() not in run("squeue", "--noheader", "--format=%i", "-tPD"))
        yield

    def preempted_with_sigterm_only(self) -> Iterator[None]:
        local_cluster("user-signal", "off")
        yield from self.preempted()
        local_cluster("user-signal", "on")

    def preempted_without_grace(self) -> Iterator[None]:
        run("scontrol", "update", "partitionname=low", "gracetime=0")
        yield from self.preempted()
        run("scontrol", "update", "partitionname=low", "gracetime=20")

    def node_failure(self) -> Iterator[None]:
        """Alternately that of the supervisor and another, where there is one."""
        node = f"node{1 + len(self.log['node_failure']) % self.nodes}"
        local_cluster("kill-node", node)
        run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        local_cluster("start-node", node)
        run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        yield

    def node_rebooted(self) -> Iterator[None]:
        """Faster than Slurm looks: it takes the node for one that was there all along."""
        node = f"node{1 + len(self.log['node_rebooted']) % self.nodes}"
        local_cluster("kill-node", node)
        local_cluster("start-node", node)
        yield

    def time_limit(self) -> Iterator[None]:
        """The real one, 40 to 100 s from now: Slurm signals 20 to 80 s before it."""
        started = run("squeue", "--noheader", "--format=%M", f"--job={self.job}").strip()
        minutes = sum(
            int(part) * unit for part, unit in zip(reversed(started.split(":")), (1 / 60, 1, 60), strict=False)
        )
        run("scontrol", "update", f"jobid={self.job}", f"timelimit={int(minutes + 2 / 3) + 1}")
        # Put right while the job waits for its next start, which might not train a step within a minute's limit.
        attempt = len(self.record.attempts) - 1
        self.wait("the time limit", lambda: self.record.attempts[attempt].next == "requeue")
        asked = ("squeue", "--noheader", "--format=%t", f"--job={self.job}")
        self.wait("the queue", lambda: len(self.record.attempts) > attempt + 1 or run(*asked).strip() == "PD")
        run("scontrol", "update", f"jobid={self.job}", "timelimit=600")
        yield

    def slurmctld_restarted(self) -> Iterator[None]:
        """While it is away the run is told to stop: it has to ask for its requeue until someone answers."""
        local_cluster("service", "stop", "slurmctld")
        for process in self.processes("cxr_vae"):
            process.send_signal(12)
        time.sleep(6)
        local_cluster("service", "start", "slurmctld")
        yield

    def slurmdbd_away(self) -> Iterator[None]:
        local_cluster("service", "stop", "slurmdbd")
        run("scancel", "--signal=USR2", self.job)
        yield
        local_cluster("service", "start", "slurmdbd")

    def log_disk_full(self) -> Iterator[None]:
        logs = self.run_dir / "logs"
        run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(logs))
        with contextlib.suppress(OSError), (logs / "others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        run("scancel", "--signal=USR2", self.job)
        yield
        run("umount", "--lazy", str(logs))

    def strike(self, event: str) -> None:
        """Lets an event happen, and waits until the run trains again."""
        goal = self.last_step() + self.rng.randint(3, 15)
        self.wait("training", lambda: self.last_step() >= goal)
        num_attempts, began, step = len(self.record.attempts), self.began(), self.last_step()
        start = time.monotonic()
        doing = getattr(self, event)()
        with undone(doing):
            step = max(step, self.last_step())
            while len(self.record.attempts) == num_attempts:
                step = max(step, self.last_step())
                if time.monotonic() - start > HANG_S:
                    raise TimeoutError(f"{event}: no other attempt; {run('squeue', '--all', check=False)}")
                time.sleep(0.02)
            self.wait(event, lambda: self.began() > began)
            resumed = self.record.attempts[-1].progress
            time.sleep(0.3)  # now it cuts from metrics.jsonl what was lost
            self.wait(event, lambda: self.last_step() > resumed)
            seconds = time.monotonic() - start
        self.log[event].append((step - resumed, seconds))
        before = self.record.attempts[-2]
        how = f"{before.outcome or 'cut off'}{'; ' + before.why if before.why else ''}"
        print(f"{event:28} at step {step:5}, {step - resumed:3} lost, {seconds:5.1f} s, {how}", flush=True)


@contextmanager
def undone(event: Iterator[None]) -> Iterator[None]:
    next(event)
    try:
        yield
    finally:
        next(event, None)


EVENTS = (
    "time_limit",
    "preempted",
    "preempted_with_sigterm_only",
    "preempted_without_grace",
    "scontrol_requeue",
    "scancel_usr2",
    "node_failure",
    "node_rebooted",
    "rank_killed",
    "task_killed",
    "slurmctld_restarted",
    "slurmdbd_away",
    "log_disk_full",
)

GRACEFUL = ("time_limit", "preempted", "preempted_with_sigterm_only", "scancel_usr2", "slurmdbd_away", "log_disk_full")
"""A signal came in time: nothing may be lost."""
