"""Interrupts one training run on a real Slurm in every way a cluster knows; it must end as one that never was.

    slurm/local_cluster up && eval "$(slurm/local_cluster env)"
    python -m benchmarks.slurm_chaos [--rounds 3] [--nodes 2] [--ranks 2] [--seed 0]

One run of `nodes` x `ranks` processes, submitted once with cxr-launch; then, in random order, `rounds` times each event
of benchmarks/slurm_events.py. Nothing is done by hand to bring the run back. Its weights, its last checkpoint and its
metrics.jsonl are compared bit for bit with those of a run of as many processes that was left alone. Prints a line an
event, a table of steps lost and of seconds until it trained again, and the verdict; exits with 1 where the run differs.

Until the last event each step is made to last STEP_S, by a sleep: else the run would have ended before it.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from benchmarks.faults import make_shards, same
from benchmarks.slurm_events import EVENTS, GRACEFUL, Trial, run

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
