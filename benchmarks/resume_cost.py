"""Time to the first step, and memory, of a run that is 0, 1e4 and 1e10 images in: they should be the same.

    python -m benchmarks.resume_cost SHARDS [--rounds 5] [--num 5000000] [--positions 0 10000 10000000000]

With SHARDS, and with shards of --num images made of them in a temporary folder: the index is as large as that of so
many images, and its rows point at the images of SHARDS over and over (1.2 GB of disk and 4 GB of memory for 5 million).
Each run gets a checkpoint at its position and is started by `cxr-vae train`; the time is that from the start of the
command to the line of its first step in metrics.jsonl, with the files in the kernel's cache. The model is small, so
that it doesn't hide what starting takes. Each run has the metrics.jsonl it would have, of at most its last 400,000
lines (110 MB). The positions take turns, in another order each round. Exits with 1 where another takes 10 %
longer than 0, or a process more than 1 GiB. The machine should have nothing else to do.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tabulate import tabulate

from cxr_vae.checkpoints.saving import Checkpoints
from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config import Config
from cxr_vae.config_file import dump_config, load_config
from cxr_vae.data.index import TEXTS, ShardDirectory, save_columns
from cxr_vae.distributed import World
from cxr_vae.files import sha256_of, write_json
from cxr_vae.run_dir import RunDir

POSITIONS = (0, 10**4, 10**10)
BATCH = 20
TEXT_WIDTH = 60
HANG_S = 900.0

LINES = 400_000
LINE = """{"kind": "step", "step": %d, "samples_seen": %d, "loss_nats": 697.2674031257629, "reconstruction_nats": \
692.4566476004464, "kl_nats": 4.810755525316511, "bits_per_dim": 0.9823674068975233, "lr": 0.001, "kl_weight": 1.0, \
"gradient_norm": 89.10752868652344}
"""

SLOWER, MEMORY_MB = 1.10, 1024 * 1.048576


def enlarge(shards: Path, out: Path, num: int) -> None:
    """Shards of `num` training images: the tars of `shards`, with an index that goes through them over and over."""
    manifest = dict(ShardDirectory.open(shards).manifest)
    manifest["splits"] = {name: manifest["splits"][name] for name in ("train", "test")}
    for entry in manifest["splits"].values():
        for file in (entry["index"]["file"], *(shard["file"] for shard in entry["shards"])):
            try:
                os.link(shards / file, out / file)
            except OSError:  # another file system
                shutil.copyfile(shards / file, out / file)
    entry = manifest["splits"]["train"]
    path = out / entry["index"]["file"]
    columns = load_file(path)
    for name in TEXTS:
        texts = columns[name].view(f"S{columns[name].shape[1]}")[:, 0]
        wide = np.char.ljust(texts, TEXT_WIDTH, b"x")
        columns[name] = wide.view(np.uint8).reshape(len(texts), wide.itemsize)
    rows = np.arange(num) % len(columns["label"])
    columns = {name: column[rows] for name, column in columns.items()}
    path.unlink()
    save_columns(path, columns)
    labels = np.bincount(columns["label"], minlength=len(manifest["classes"])).tolist()
    entry |= {
        "count": num,
        "count_per_class": dict(zip(manifest["classes"], labels, strict=True)),
        "index": {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)},
    }
    counts = np.bincount(columns["shard"], minlength=len(entry["shards"])).tolist()
    entry["shards"] = [shard | {"count": count} for shard, count in zip(entry["shards"], counts, strict=True)]
    write_json(out / "manifest.json", manifest)


def config_for(shards: Path, run: Path) -> Config:
    """A small model, and more epochs than the last position needs."""
    manifest = ShardDirectory.open(shards).manifest
    epochs = 2 * max(POSITIONS) // manifest["splits"]["train"]["count"] + 2
    options = [
        *(f"data.shards={shards}", f"run_dir={run}", "loading=shards", "device=cpu", "precision=fp32"),
        *(f"{name}={manifest[name]}" for name in ("image_size", "fit", "format")),
        *("model.channels=[8, 16]", "latent_dim=4", f"batch_size={BATCH}", f"epochs={epochs}", "log_every=1"),
    ]
    return load_config(None, options)


def place(samples_seen: int, config: Config) -> None:
    """Leaves the run directory of a run that was stopped after so many images."""
    splits = ShardDirectory.open(Path(config.data.shards)).manifest["splits"]
    hashes = {name: splits[name]["index"]["sha256"] for name in (config.data.train_split, config.data.test_split)}
    run, alone = RunDir(Path(config.run_dir)), World(0, 1, 0, 1, torch.device("cpu"))
    state = TrainState.create(config, alone.device)
    state.step, state.samples_seen = samples_seen // BATCH, samples_seen
    run.claim(config, {"world_size": 1, "device": "cpu"})
    checkpoints = Checkpoints(run.checkpoints, alone, config, hashes)
    checkpoints.save(state)
    checkpoints.wait()
    with run.metrics.open("w") as metrics:
        for step in range(max(1, state.step - LINES + 1), state.step + 1):
            metrics.write(LINE % (step, step * BATCH))


def start(samples_seen: int, shards: Path) -> tuple[float, float, float]:
    """Seconds from the start of the command to its first step; then MB at the peak, and MB that are not files."""
    with tempfile.TemporaryDirectory(prefix="resume-cost-") as folder:
        run, yaml = Path(folder) / "run", Path(folder) / "config.yaml"
        config = config_for(shards, run)
        yaml.write_text(dump_config(config))
        if samples_seen:
            place(samples_seen, config)
        with (Path(folder) / "log").open("wb") as log:
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "cxr_vae", "train", yaml], stdout=log, stderr=log)
        try:
            metrics = RunDir(run).metrics
            while last_samples_seen(metrics) <= samples_seen:
                if process.poll() is not None or time.perf_counter() - begun > HANG_S:
                    sys.exit(f"no step was done:\n{(Path(folder) / 'log').read_text()}")
                time.sleep(0.005)
            seconds = time.perf_counter() - begun
            status = Path(f"/proc/{process.pid}/status").read_text()
        finally:
            process.kill()
            process.wait()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith(" kB")}
    return seconds, kilobytes["VmHWM"] * 1.024e-3, kilobytes["RssAnon"] * 1.024e-3


def last_samples_seen(path: Path) -> int:
    """The most in the last lines of a metrics file that may not be there yet; else 0."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8000))
        return max(map(int, re.findall(rb'"samples_seen": (\d+),', file.read())), default=0)


def spread(values: Sequence[float], digits: int) -> str:
    """`median (min–max)`."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num", type=int, default=5_000_000, help="images of the enlarged shards")
    told = "images seen; 0 must be among them"
    parser.add_argument("--positions", type=int, nargs="+", default=POSITIONS, choices=POSITIONS, help=told)
    arguments = parser.parse_args()
    if 0 not in arguments.positions:
        parser.error("--positions: without 0 there is nothing to compare with")
    positions = sorted(arguments.positions)
    rng, load = random.Random(0), os.getloadavg()[0]
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="resume-cost-shards-") as folder:
        enlarge(arguments.shards, Path(folder), arguments.num)
        for shards in (arguments.shards, Path(folder)):
            num_images = len(ShardDirectory.open(shards).split("train"))  # reads the index: now it is in the cache
            start(0, shards)  # warms up, not counted
            found: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
            for _ in range(arguments.rounds):
                for position in rng.sample(positions, len(positions)):
                    found[position].append(start(position, shards))
            for position in positions:
                seconds, peaks, anonymous = zip(*found[position], strict=True)
                ratios = [here[0] / there[0] for here, there in zip(found[position], found[0], strict=True)]
                cells = [spread(seconds, 2), spread(ratios, 2), f"{max(peaks):.0f}", f"{max(anonymous):.0f}"]
                rows.append([f"{num_images:,}", f"{position:,}", *cells])
                if statistics.median(ratios) > SLOWER:
                    wrong.append(f"{num_images:,} images, {position:,} seen: {statistics.median(ratios):.2f} times 0's")
                if max(peaks) > MEMORY_MB:
                    wrong.append(f"{num_images:,} images, {position:,} seen: {max(peaks):.0f} MB")
    headers = ["images", "seen", "first step after, s", "/ that of 0", "peak, MB", "anonymous, MB"]
    print(f"{arguments.rounds} rounds, median (min–max); load average before: {load:.1f}")
    print("peak: VmHWM, with the pages of mapped files; anonymous: RssAnon at the first step\n")
    print(tabulate(rows, headers, colalign=["right"] * 2 + ["left"] * 2 + ["right"] * 2, disable_numparse=True))
    target = f"at most {SLOWER} times the time of 0, and {MEMORY_MB:.0f} MB (1 GiB) a process"
    print(f"\ntarget: {target}: {'MISSED: ' + '; '.join(wrong) if wrong else 'met'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
