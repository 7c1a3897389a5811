"""Kills training runs over and over; each must end with the weights of a run that was never disturbed.

    python -m benchmarks.faults [--kills 200] [--seed 0]

A run of 1 or 2 processes is killed (SIGKILL) some eight times, each time started again by the same command, then left
to finish: at random moments one rank, all ranks, torchrun alone, or all at once; and from within, at each phase of a
checkpoint. Its weights, its last checkpoint (optimizer, average, counters) and its metrics.jsonl are compared bit for
bit with those of the undisturbed run. Prints a line a kind of kill and the verdict; exits with 1 where a run differs
or a process outlives its job.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open
from tabulate import tabulate

KILLS_A_RUN = 8
HANG_S = 900.0
LONGEST_S = 180.0
"""Until a random moment comes."""

OUTSIDE = ("one rank", "all ranks", "torchrun", "torchrun and ranks")
"""Killed at a random moment, from the first import on."""

PHASES = {
    "write in flight": "the loop has gone on, the thread is writing",
    "after the first shard": "one rank's part is there, the other's may not be",
    "before the manifest": "all parts are there",
    "inside the manifest": "manifest.json is there, its checksum not",
    "before the rename": "all is there, under its temporary name",
    "before pruning": "it is published, older ones not yet removed",
    "inside pruning": "an older one is half removed",
}

OPTIONS = (
    *("image_size=32", "model.channels=[8, 16]", "latent_dim=4", "batch_size=14", "accumulate=2", "device=cpu"),
    *("epochs=50", "log_every=1", "grid_every=1000", "ema_decay=0.99", "kl_warmup_steps=100", "schedule=cosine"),
    *("checkpoint.every_steps=11", "checkpoint.keep=2", "checkpoint.keep_every=55"),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(phase: str, nth: int, arguments: list[str]) -> int:
    """`cxr-vae` that kills itself in a phase of its `nth` checkpoint."""
    from cxr_vae import cli
    from cxr_vae.checkpoints import manifest as checkpoint_manifest
    from cxr_vae.checkpoints import parts
    from cxr_vae.checkpoints import saving as checkpoint

    count = 0

    def dying(function: Callable[..., Any], before: bool = True) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= nth and before:
                die()
            result = function(*args, **options)
            if count >= nth:
                die()
            return result

        return wrapped

    def half_removed(path: Path, **_: Any) -> None:
        next(iter(Path(path).iterdir())).unlink()
        die()

    if phase == "write in flight":
        checkpoint.Checkpoints.save = dying(checkpoint.Checkpoints.save, before=False)  # type: ignore[method-assign]
    elif phase == "after the first shard":
        parts.PartWriter.write_data = dying(parts.PartWriter.write_data, before=False)  # type: ignore[method-assign]
    elif phase == "before the manifest":
        checkpoint.write_manifest = dying(checkpoint.write_manifest)
    elif phase == "inside the manifest":
        checkpoint_manifest.write_json = dying(checkpoint_manifest.write_json, before=False)
    elif phase == "before the rename":
        checkpoint.publish = dying(checkpoint.publish)
    elif phase == "before pruning":
        checkpoint.prune = dying(checkpoint.prune)
    elif phase == "inside pruning":
        prune = checkpoint.prune

        def pruning(*args: Any) -> None:
            checkpoint.shutil.rmtree = half_removed  # type: ignore[assignment]
            prune(*args)

        checkpoint.prune = pruning
    return cli.main(arguments)


def make_shards(folder: Path) -> Path:
    """70 phantoms to train on and some to test on, at 32 px."""
    from cxr_vae.data.shards import write_shards
    from cxr_vae.data.tars import Preprocessing
    from cxr_vae.phantoms.folder import write_phantoms

    write_phantoms(folder / "phantoms", 86, 0)
    write_shards(folder / "phantoms", folder / "shards", Preprocessing(32), workers=2)
    return folder / "shards"


def command(ranks: int, run: Path, shards: Path, loading: str, phase: str | None = None, nth: int = 1) -> list[str]:
    """The training run; with a phase, through `child`."""
    program = [__file__, "--child", phase, str(nth)] if phase else ["-m", "cxr_vae"]
    if ranks > 1:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*many, *program, *(["--"] if not phase else [])]
    paths = [f"data.shards={shards}", f"run_dir={run}", f"loading={loading}"]
    return [sys.executable, *program, "train", "configs/reference.yaml", *OPTIONS, *paths]


def start(call: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
        return subprocess.Popen(call, stdout=out, stderr=out, env=environment)


def ranks_of(run: Path, launcher: int) -> list[psutil.Process]:
    """The processes that train this run, without their torchrun."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"run_dir={run}" in (process.info["cmdline"] or []) and process.pid != launcher:
            found.append(process)
    return found


def num_steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def kill_from_outside(kind: str, process: subprocess.Popen[bytes], run: Path, ranks: int, rng: random.Random) -> None:
    """Waits for a random moment and kills."""
    goal = num_steps(run) + rng.randint(1, 45)
    deadline = time.monotonic() + (rng.uniform(0, 6) if rng.random() < 0.25 else LONGEST_S)
    while process.poll() is None and time.monotonic() < deadline and num_steps(run) < goal:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.03))
    victims = ranks_of(run, process.pid) if ranks > 1 else []
    if kind == "one rank" and victims:
        victims = [rng.choice(victims)]
    if kind in ("torchrun", "torchrun and ranks") or not victims:  # a single process has no torchrun
        process.kill()
    if kind == "torchrun":
        return
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def state_of(run: Path) -> dict[str, Any]:
    """All tensors of the newest checkpoint and of the final weights, as bytes."""
    newest = max((run / "checkpoints").glob("step-??????????"))
    tensors = {}
    for path in (*newest.glob("*.safetensors"), run / "vae_final.safetensors"):
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118  (no mapping)
    return tensors


def same(run: Path, other: Path) -> bool:
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (run, other)]
    return metrics[0] == metrics[1] and state_of(run) == state_of(other)


def trial(
    run: Path, undisturbed: Path, shards: Path, ranks: int, loading: str, kinds: list[str], rng: random.Random
) -> tuple[list[tuple[str, float | None]], bool]:
    """One run through its kills to its end: (kind, seconds until all was gone) of each, and whether it ended equal."""
    times = []
    for kind in kinds:
        phase = kind if kind in PHASES else None
        process = start(command(ranks, run, shards, loading, phase, rng.randint(1, 6)), run.with_suffix(".log"))
        if phase is None:
            kill_from_outside(kind, process, run, ranks, rng)
        killed = time.monotonic()
        process.wait(HANG_S)
        if kind != "torchrun":  # there the next start has to wait for the ranks by itself
            while ranks_of(run, process.pid):
                if time.monotonic() - killed > HANG_S:
                    raise TimeoutError(f"{kind}: a process outlived its job, see {run.with_suffix('.log')}")
                time.sleep(0.02)
        times.append((kind, None if phase or kind == "torchrun" else time.monotonic() - killed))
    process = start(command(ranks, run, shards, loading), run.with_suffix(".log"))
    code = process.wait(HANG_S * 4)
    return times, code == 0 and same(run, undisturbed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-a-run", type=int, default=KILLS_A_RUN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=Path, help="at 32 px, to train on (default: of phantoms drawn for it)")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child[0], int(arguments.child[1]), arguments.child[2:])

    rng = random.Random(arguments.seed)
    kinds = [(*OUTSIDE, *PHASES)[number % (len(OUTSIDE) + len(PHASES))] for number in range(arguments.kills)]
    rng.shuffle(kinds)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    shards = arguments.shards or make_shards(folder)
    undisturbed = {ranks: folder / f"undisturbed{ranks}" for ranks in (1, 2)}
    for ranks, run in undisturbed.items():
        if start(command(ranks, run, shards, "memory"), folder / "undisturbed.log").wait():
            print(f"the undisturbed run failed: {folder / 'undisturbed.log'}")
            return 1
    seconds, equal = defaultdict(list), defaultdict(list)
    while kinds:
        mine, kinds = kinds[: arguments.kills_a_run], kinds[arguments.kills_a_run :]
        ranks = 3 - ranks
        loading = rng.choice(["memory", "shards"])
        run = folder / f"run{len(kinds):04d}"
        times, ended_equal = trial(run, undisturbed[ranks], shards, ranks, loading, mine, rng)
        for kind, time_s in times:
            equal[kind, ranks].append(ended_equal)
            seconds[kind, ranks] += [] if time_s is None else [time_s]
        print(
            f"{run.name}: {ranks} ranks, {loading}, {len(mine)} kills: {'equal' if ended_equal else 'DIFFERS'}",
            flush=True,
        )
        if ended_equal:
            shutil.rmtree(run)
    rows = [
        [
            kind,
            ranks,
            len(verdicts),
            sum(verdicts),
            median(seconds[kind, ranks]),
            max(seconds[kind, ranks], default=None),
        ]
        for (kind, ranks), verdicts in sorted(equal.items())
    ]
    headers = ["killed", "processes", "kills", "in runs that ended equal", "s until all had ended", "longest"]
    print("\n" + tabulate(rows, headers, floatfmt=".1f"))
    verdicts = [verdict for several in equal.values() for verdict in several]
    print(f"\n{sum(verdicts)} of {len(verdicts)} kills in runs that ended equal, bit for bit")
    if all(verdicts):
        shutil.rmtree(folder)
    return 0 if all(verdicts) else 1


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    sys.exit(main())
