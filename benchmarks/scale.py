"""What five million images cost a process before its first batch: time and memory.

    python -m benchmarks.scale [--num 5000000] [--block 32]

Makes an index of that many rows, over links to one tar of small images, so the images repeat but every row is read,
checked and decoded as any other; texts have the lengths of Kaggle's. Then a fresh process, as each rank is, opens it,
draws the permutation of an epoch and reads the first batch of 32. The target is 5 s and 1 GiB beyond torch itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_vae.data.index import MANIFEST, ShardDirectory, save_columns
from cxr_vae.data.shards import num_shards, write_shards
from cxr_vae.data.tars import Preprocessing

SIDE = 32


def build(num: int, out: Path) -> Path:
    """A shard directory whose train split has `num` rows, all of one tar of 4,096 images."""
    rng = np.random.default_rng(0)
    for number in range(256):  # then their rows many times: every row is read all the same
        label = ("NORMAL", "PNEUMONIA")[number % 2]
        path = out / "source" / "train" / label / f"person{number}_bacteria_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(path)
    made = write_shards(out / "source", out / "small", Preprocessing(SIDE, "stretch", "raw"), workers=1)
    index = made.split("train")
    shards = num_shards(num)
    big = out / "big"
    big.mkdir()
    rows = np.arange(num) % len(index)
    columns = {
        name: index.numbers(name)[rows] for name in ("offset", "size", "crc32", "label", "width", "height", "sha256")
    }
    first_of = index.numbers("shard")[rows]
    per_copy = len(index.shards)
    columns["shard"] = (first_of + per_copy * (np.arange(num) * (shards // per_copy) // num)).astype(np.uint32)
    for name in ("key", "source", "patient"):
        texts = [f"train/{number:07d}_{name}".encode() for number in range(num)]
        wide = np.array(texts, dtype="S48")
        columns[name] = wide.view(np.uint8).reshape(num, 48)
    save_columns(big / "train.index.safetensors", columns)
    names = [f"train-{number:06d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        os.link(index.shards[number % per_copy], big / name)
    manifest = json.loads((made.path / MANIFEST).read_text())
    path = big / "train.index.safetensors"
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    sizes = [index.shards[number % per_copy].stat().st_size for number in range(shards)]
    manifest["splits"]["train"] |= {
        "count": num,
        "index": {"file": path.name, "bytes": path.stat().st_size, "sha256": digest},
        "shards": [{"file": name, "bytes": size} for name, size in zip(names, sizes, strict=True)],
    }
    (big / MANIFEST).write_text(json.dumps(manifest))
    return big


def first_batch(shards: Path, block: int) -> None:
    """In a process of its own: prints seconds and the peak of memory, beyond what importing torch takes."""
    import torch

    from cxr_vae.config import DataConfig
    from cxr_vae.data.dataset import open_dataset, open_split, read_ahead
    from cxr_vae.data.stream import TrainingStream
    from cxr_vae.distributed import World
    from cxr_vae.training.efficiency import peak_memory

    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    start = time.perf_counter()
    config = DataConfig(shards=str(shards), image_size=SIDE, format="raw", loading="shards", shuffle_block=block)
    dataset = open_dataset(config, open_split(config, "train"), World(0, 1, 0, 1, cpu))
    opened = time.perf_counter() - start
    stream = TrainingStream(len(dataset), 0, block)
    with read_ahead(dataset, (stream.rows(i, i + 32) for i in range(0, 3200, 32))) as batches:
        assert next(batches).shape == (32, 1, SIDE, SIDE)
        seconds = time.perf_counter() - start
    peak = (peak_memory(cpu) - before) / 2**30
    print(json.dumps({"opened_s": round(opened, 2), "first_batch_s": round(seconds, 2), "peak_gib": round(peak, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=5_000_000)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_batch:
        first_batch(arguments.first_batch, arguments.block)
        return
    work = Path(tempfile.mkdtemp())
    shards = build(arguments.num, work)
    size = (shards / "train.index.safetensors").stat().st_size
    tars = len(ShardDirectory.open(shards).split("train").shards)
    print(f"{arguments.num:,} rows, {tars} tars, index {size / 1e6:.0f} MB", flush=True)
    for block in (1, 32):
        for _ in range(3):
            call = [sys.executable, "-m", "benchmarks.scale", "--first-batch", str(shards), "--block", str(block)]
            told = subprocess.run(call, capture_output=True, text=True, check=True).stdout
            print(f"block {block}: {told.strip()}", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
