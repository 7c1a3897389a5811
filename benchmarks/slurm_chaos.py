"""Interrupts one training run on a real Slurm in every way a cluster knows; it must end as one that never was.

    slurm/local_cluster up && eval "$(slurm/local_cluster env)"
    python -m benchmarks.slurm_chaos [--rounds 3] [--nodes 2] [--ranks 2] [--seed 0]

One run of `nodes` x `ranks` processes, submitted once with cxr-launch; then, in random order, `rounds` times each event
of EVENTS below. Nothing is done by hand to bring the run back. Its weights, its last checkpoint and its metrics.jsonl
are compared bit for bit with those of a run of as many processes that was left alone. Prints a line an event, a table
of steps lost and of seconds until it trained again, and the verdict; exits with 1 where the run differs.

Until the last event each step is made to last STEP_S, by a sleep: else the run would have ended before it.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tabulate import tabulate

from benchmarks.faults import make_shards, same
from launch.records import Record, records_of

EVERY_STEPS = 20
"""Steps between checkpoints: no event may cost more."""

STEP_S = 0.5

SLOW = """
import os, sys, time
if "cxr_vae" in sys.orig_argv and os.path.exists({flag!r}):
    import cxr_vae.training.train as train
    step = train.Training.step
    def slow(*arguments):
        outcome = step(*arguments)
        if os.path.exists({flag!r}):
            time.sleep({seconds})
        return outcome
    train.Training.step = slow
"""
"""Runs at the start of every Python of the job, as its sitecustomize."""

HANG_S = 900.0

OPTIONS = (
    *(
        "image_size=32",
        "model.channels=[32, 64, 64]",
        "latent_dim=16",
        "batch_size=64",
        "device=cpu",
        "log_every=1",
        "precision=fp32",
    ),
    *("grid_every=100000", "ema_decay=0.99", "kl_warmup_steps=100", f"checkpoint.every_steps={EVERY_STEPS}"),
    *("checkpoint.every_minutes=null", "cpus_per_process=1", "resources.memory_gb=2", "resources.hours=10"),
)


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


def submit(run_dir: Path, shards: Path, arguments: argparse.Namespace, *more: str) -> str:
    shape = (f"nodes={arguments.nodes}", f"processes_per_node={arguments.ranks}", f"epochs={arguments.epochs}")
    where = ("--profile", "local_cluster", "--cluster", "slurm", "--sbatch", "partition=low")
    if "inline" in more:
        shape = ("nodes=1", f"processes_per_node={arguments.nodes * arguments.ranks}", f"epochs={arguments.epochs}")
        where = ("--cluster", "inline")
    call = ["-c", "from launch.cli import main; raise SystemExit(main())", "train", "configs/reference.yaml"]
    paths = (f"data.shards={shards}", f"run_dir={run_dir}")
    return run(sys.executable, *call, *OPTIONS, *shape, *paths, *where)


def table(trial: Trial) -> str:
    rows = []
    for event, struck in sorted(trial.log.items()):
        lost, seconds = ([one[number] for one in struck] for number in (0, 1))
        rows.append([event, len(struck), max(lost), statistics.median(seconds), max(seconds)])
    headers = ["event", "times", "most steps lost", "median s until it trained", "longest"]
    return tabulate(rows, headers, floatfmt=".1f")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", nargs="+", default=EVENTS, choices=EVENTS)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="a node")
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=Path, help="at 32 px, to train on (default: of phantoms drawn for it)")
    arguments = parser.parse_args()

    events = list(arguments.events) * arguments.rounds
    random.Random(arguments.seed).shuffle(events)
    # Below the cluster's directory a file system mounted later, as a full disk, is seen by the jobs.
    shared = Path(os.environ["SLURM_CONF"]).parents[1] / "shared"
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=shared if shared.is_dir() else None))
    shards = arguments.shards or make_shards(folder)
    slow = folder / "slow"
    slow.touch()
    (folder / "sitecustomize.py").write_text(SLOW.format(flag=str(slow), seconds=STEP_S))
    os.environ["PYTHONPATH"] = f"{folder}:{Path(__file__).parents[1]}"
    trial = Trial(folder / "run", arguments.nodes, arguments.ranks, random.Random(arguments.seed))
    submit(trial.run_dir, shards, arguments)
    trial.job = trial.record.job
    began = time.monotonic()
    for event in events:
        trial.strike(event)
    print(f"{len(events)} interruptions in {time.monotonic() - began:.0f} s; to the end of the run", flush=True)
    slow.unlink()
    trial.wait("the end", (trial.run_dir / "vae_final.safetensors").is_file, 3600)
    trial.wait("the verdict", lambda: trial.record.attempts[-1].outcome == "done")
    submit(folder / "undisturbed", shards, arguments, "inline")
    equal = same(trial.run_dir, folder / "undisturbed")

    print(f"\n{table(trial)}\n")
    print(f"{len(events)} interruptions of one run of {trial.nodes} x {trial.ranks} processes, ", end="")
    print("which ended equal, bit for bit" if equal else f"which DIFFERS from {folder / 'undisturbed'}")
    kept = all(
        lost <= (0 if event in GRACEFUL else EVERY_STEPS) for event, all_ in trial.log.items() for lost, _ in all_
    )
    print(f"steps lost: at most {EVERY_STEPS}, none where a signal came in time: {'held' if kept else 'MISSED'}")
    if equal and kept:
        shutil.rmtree(folder)
    return 0 if equal and kept else 1


if __name__ == "__main__":
    sys.exit(main())
