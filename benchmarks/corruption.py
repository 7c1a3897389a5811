"""Damages checkpoints in every way and fills the disk; training must notice, fall back, and execute nothing.

    python -m benchmarks.corruption [--rounds 8]

Two runs, of one process and of two, are trained to three checkpoints each. A copy's newest checkpoint, or its newest
two, are damaged; then training is resumed: it must load the newest that is whole, name each it skipped with the
reason, hold exactly the state that was saved, and create no file that a pickle hidden in the checkpoint would create.
Then the disk is filled in the middle of a save (a small tmpfs; root only). Prints a line a kind of damage and the
verdict; exits with 1 where one was missed.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.faults import make_shards

OPTIONS = ("image_size=32", "model.channels=[8, 16]", "latent_dim=4", "batch_size=14", "device=cpu", "ema_decay=0.9")
LENGTH = ("epochs=3", "checkpoint.every_steps=5", "checkpoint.best=false")

Damage = Callable[[Path, Path, random.Random], object]
"""Called with the checkpoint to damage, one of another number of processes, and a random generator."""


class Malice:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pick(checkpoint: Path, pattern: str, rng: random.Random) -> Path:
    return rng.choice(sorted(checkpoint.glob(pattern)))


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def rewrite_world_size(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"world_size": 7}, indent=2) + "\n")


def older(checkpoint: Path) -> Path:
    """The one before it, of the same run."""
    return max(path for path in checkpoint.parent.glob("step-*") if path.name < checkpoint.name)


PART, MANIFEST, CHECKSUM = "*.safetensors", "manifest.json", "manifest.json.sha256"

DAMAGES: dict[str, Damage] = {
    "bit flip in a part": lambda c, _, rng: flip_bit(pick(c, PART, rng), rng),
    "bit flip in the manifest": lambda c, _, rng: flip_bit(c / MANIFEST, rng),
    "bit flip in the checksum": lambda c, _, rng: flip_bit(c / CHECKSUM, rng),
    "part cut short": lambda c, _, rng: os.truncate(p := pick(c, PART, rng), rng.randrange(p.stat().st_size)),
    "part with bytes added": lambda c, _, rng: pick(c, PART, rng).open("ab").write(b"\0"),
    "part deleted": lambda c, _, rng: pick(c, PART, rng).unlink(),
    "manifest emptied": lambda c, _, rng: (c / MANIFEST).write_text(""),
    "manifest cut short": lambda c, _, rng: os.truncate(c / MANIFEST, rng.randrange((c / MANIFEST).stat().st_size)),
    "manifest deleted": lambda c, _, rng: (c / MANIFEST).unlink(),
    "checksum deleted": lambda c, _, rng: (c / CHECKSUM).unlink(),
    "part of an older checkpoint": lambda c, _, rng: shutil.copy(older(c) / (p := pick(c, PART, rng)).name, p),
    "manifest of an older checkpoint": lambda c, _, rng: shutil.copy(older(c) / MANIFEST, c / MANIFEST),
    "part of another world size": lambda c, other, rng: shutil.copy(pick(other, PART, rng), pick(c, PART, rng)),
    "part too many": lambda c, other, rng: shutil.copy(pick(other, PART, rng), c / "shard-00009.safetensors"),
    "another world size written in": lambda c, _, rng: rewrite_world_size(c),
    "pickle in place of a part": lambda c, _, rng: pick(c, PART, rng).write_bytes(pickle.dumps(Malice(c / "executed"))),
    "pickle in place of the manifest": lambda c, _, rng: (c / MANIFEST).write_bytes(
        pickle.dumps(Malice(c / "executed"))
    ),
}


def train(run: Path, shards: Path, *options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    paths = [f"data.shards={shards}", f"run_dir={run}"]
    call = [sys.executable, *many, "-m", "cxr_vae", "train", "configs/reference.yaml", *OPTIONS, *paths, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    return subprocess.run(call, capture_output=True, text=True, check=False, env=environment)


def resume(run: Path, shards: Path) -> tuple[str | None, list[str], dict[str, torch.Tensor]]:
    """What training loads from the run: the checkpoint's name, what was skipped and why, and the state."""
    from cxr_vae.checkpoints.saving import Checkpoints
    from cxr_vae.checkpoints.state import TrainState
    from cxr_vae.config_file import load_config
    from cxr_vae.data.index import ShardDirectory
    from cxr_vae.distributed import World
    from cxr_vae.run_dir import RunDir

    config = load_config(run / "config.yaml", [])
    hashes = {name: ShardDirectory.open(shards).split(name).content_hash for name in ("train", "test")}
    state = TrainState.create(config, torch.device("cpu"))
    here = World(0, 1, 0, 1, torch.device("cpu"))
    name, skipped = Checkpoints(RunDir(run).checkpoints, here, config, hashes).load_latest(state)
    return name, skipped, {name: tensor.clone() for name, tensor in state.state_dict().items()}


def trial(whole: Path, other: Path, shards: Path, damage: Damage, count: int, rng: random.Random) -> str:
    """Damages the newest `count` checkpoints of a copy and resumes it; "" or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        run = shutil.copytree(whole, Path(folder) / "run")
        names = sorted((path.name for path in (run / "checkpoints").glob("step-*")), reverse=True)
        for name in names[:count]:
            damage(run / "checkpoints" / name, other / "checkpoints" / name, rng)
        loaded, skipped, state = resume(run, shards)
        if any(run.rglob("executed")):
            return "EXECUTED"
        if loaded != names[count]:
            return f"loaded {loaded}, not {names[count]}"
        if len(skipped) != count or not all(name in sentence for name, sentence in zip(names, skipped, strict=False)):
            return f"told {skipped}"
        expected = STATES[whole, loaded]
        same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        return "" if same else "another state"


STATES: dict[tuple[Path, str], dict[str, torch.Tensor]] = {}
"""Of each run and checkpoint, as it was saved."""


def remember(run: Path, shards: Path) -> None:
    """Fills STATES by loading each checkpoint while it is whole and the newest."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(run, Path(folder) / "run")
        for path in sorted((copy / "checkpoints").glob("step-*"), reverse=True):
            name, _, STATES[run, path.name] = resume(copy, shards)
            assert name == path.name
            shutil.rmtree(path)


def full_disk(folder: Path, shards: Path, on_failure: str) -> str:
    """Trains with room for not quite two checkpoints; "" or what went wrong."""
    small = folder / f"small-{on_failure}"
    (small / "checkpoints").mkdir(parents=True)
    (folder / "empty").mkdir(exist_ok=True)
    run = folder / f"run-{on_failure}"
    first = train(run, shards, "epochs=1", "checkpoint.best=false")
    (whole,) = (run / "checkpoints").glob("step-*")
    size = sum(path.stat().st_size for path in whole.iterdir())
    kept = shutil.copytree(run / "checkpoints", folder / f"kept-{on_failure}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", run / "checkpoints"], check=True)
    try:
        shutil.copytree(kept, run / "checkpoints", dirs_exist_ok=True)
        options = (*LENGTH, "epochs=4", "checkpoint.keep=9", f"checkpoint.on_failure={on_failure}")
        result = train(run, shards, *options)
        told = result.stdout + result.stderr
        if first.returncode or "No space left on device" not in told or "this checkpoint can't be written" not in told:
            return f"said {told[-300:]}"
        if result.returncode != 2 or "Traceback" in told:  # also with continue: the last one could not be written
            return f"exit code {result.returncode}"
        if (on_failure == "continue") != ("training goes on" in told):
            return f"said {told[-300:]}"
        loaded, skipped, _ = resume(run, shards)
        if loaded != whole.name or skipped:
            return f"loaded {loaded}, skipped {skipped}"
        subprocess.run(["mount", "-o", "remount,size=100m", run / "checkpoints"], check=True)
        again = train(run, shards, *LENGTH, "epochs=4")
        return "" if again.returncode == 0 else f"after making room: {again.stderr[-300:]}"
    finally:
        subprocess.run(["umount", run / "checkpoints"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of each kind of damage")
    parser.add_argument("--shards", type=Path, help="at 32 px, to train on (default: of phantoms drawn for it)")
    arguments = parser.parse_args()
    rng = random.Random(0)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = arguments.shards or make_shards(folder)
        runs = {ranks: folder / f"run{ranks}" for ranks in (1, 2)}
        for ranks, run in runs.items():
            assert train(run, shards, *LENGTH, ranks=ranks).returncode == 0
            remember(run, shards)
        for kind, damage in DAMAGES.items():
            wrong = []
            for number in range(arguments.rounds):
                ranks = 1 + number % 2
                wrong.append(trial(runs[ranks], runs[3 - ranks], shards, damage, 1 + number // 2 % 2, rng))
            rows.append([kind, len(wrong), wrong.count(""), "; ".join(sorted(set(wrong) - {""}))])
        if os.geteuid() == 0 and shutil.which("mount"):
            for on_failure in ("stop", "continue"):
                wrong = [full_disk(folder, shards, on_failure)]
                rows.append([f"disk full, {on_failure}", 1, wrong.count(""), wrong[0]])
        else:
            print("disk full: left out, it needs root to mount a small tmpfs")
    print(tabulate(rows, ["damage", "checkpoints", "found and survived", "else"]))
    tried, survived = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"\n{survived} of {tried} found, told, fallen back from; nothing executed")
    return 0 if tried == survived else 1


if __name__ == "__main__":
    sys.exit(main())
