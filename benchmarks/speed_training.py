"""The rows of benchmarks/speed.py about training: one step, a start, an epoch, ranks, and what else a run does."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from benchmarks.speed import Row, interleaved, originals, ratios
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.precision import advise, peak_flops
from cxr_vae.training.run_log import read_records

CPU = torch.device("cpu")
BATCH = 32
KAGGLE = (5216, 624)  # training and test images


def best_precision() -> str:
    """What a user sets who follows the note that training prints."""
    return "fp32" if advise("bf16", CPU) else "bf16"


def kaggle_sized(source: Path, work: Path) -> tuple[Path, Path]:
    """As many files as Kaggle's set has: the folder of originals, and shards of small copies of them."""
    folder = originals(source, work / "kaggle", *KAGGLE)
    shards = work / "kaggle_shards"
    if not (shards / "manifest.json").is_file():
        write_shards(originals(small_copies(source, work), work / "kaggle_small", *KAGGLE), shards, Preprocessing(224))
    return folder, shards


def small_copies(source: Path, work: Path) -> Path:
    """A few of the originals at 224 px, so that sharding them in numbers takes seconds."""
    from PIL import Image

    for split, count in (("train", 256), ("test", 64)):
        files = sorted((source / split).rglob("*.*"))
        for path in files[:: max(1, len(files) // count)][:count]:
            target = work / "small" / split / path.parent.name / f"{path.stem}.png"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.open(path).convert("L").resize((224, 224)).save(target)
    return work / "small"


def train_command(shards: Path, run: Path, *options: str, ranks: int = 1) -> list[str]:
    """`cxr-vae train` of the reference configuration."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    where = [f"data.shards={shards}", f"run_dir={run}", "device=cpu"]
    return [sys.executable, *many, "-m", "cxr_vae", "train", "configs/reference.yaml", *where, *options]


def run(call: list[str], **variables: str) -> str:
    done = subprocess.run(call, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{call} ended with {done.returncode}: {done.stderr[-4000:]}")
    return done.stdout


@contextmanager
def running(call: list[str], **variables: str) -> Iterator[Callable[[], None]]:
    """A command in the background, which ends with the block, with all it started; yields what raises if it ended."""
    with tempfile.TemporaryFile("w+") as told:
        process = psutil.Popen(call, env=os.environ | variables, stdout=told, stderr=told)

        def check() -> None:
            if process.poll() is not None:
                told.seek(0)
                raise RuntimeError(f"{call} ended: {told.read()[-4000:]}")

        try:
            yield check
        finally:
            with suppress(psutil.NoSuchProcess):
                everyone = [process, *process.children(recursive=True)]
                for one in everyone:
                    one.kill()
                psutil.wait_procs(everyone)


def until_first_step(call: list[str], run_dir: Path) -> float:
    """Seconds from the start of the process to the record of its first step; then it is ended."""
    start = time.perf_counter()
    with running(call) as check:
        while not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "metrics.jsonl").stat().st_size:
            check()
            time.sleep(0.01)
        return time.perf_counter() - start


def plain_first_step(folder: Path, out: Path) -> float:
    """The same of the plain program, which says it itself."""
    call = [sys.executable, "benchmarks/baseline.py", str(folder), str(out)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.kill()
    return float(first["first_step_s"])


def start(source: Path, work: Path) -> list[Row]:
    """From nothing to the end of the first step, at the size of Kaggle's set."""
    folder, shards = kaggle_sized(source, work)
    precision = best_precision()

    def ours() -> float:
        shutil.rmtree(work / "run", ignore_errors=True)
        return until_first_step(
            train_command(shards, work / "run", f"precision={precision}", "log_every=1"), work / "run"
        )

    found = interleaved({"ours": ours, "plain": lambda: plain_first_step(folder, work / "plain")})
    note = f"{statistics.median(found['ours']):.1f} s against {statistics.median(found['plain']):.1f} s"
    return [
        Row(
            "start to first step, 5,840 images",
            "plain program's",
            "≤1",
            ratios(found["ours"], found["plain"]),
            note=note,
        )
    ]


def ranks(source: Path, work: Path) -> list[Row]:
    """Steps 3 to 8 of runs with the same global batch, in bf16, or fp32 where a CPU would take minutes for each."""
    _, shards = kaggle_sized(source, work)
    precision = "bf16" if peak_flops(CPU, "bf16", 512) > 1e10 else "fp32"

    def speed(ranks: int, threads: int, *options: str) -> float:
        shutil.rmtree(work / "run", ignore_errors=True)
        more = [f"precision={precision}", "log_every=2", "max_minutes=10", *options]
        call = train_command(shards, work / "run", *more, ranks=ranks)
        with running(call, CXR_VAE_CORES=str(threads)) as check:
            while len(records := read_records(work / "run" / "speed.jsonl")) < 4:
                check()
                time.sleep(0.05)
        return 6 * BATCH / (records[3]["elapsed_s"] - records[0]["elapsed_s"])

    found = interleaved(
        {
            "one": lambda: speed(1, 2),
            "two": lambda: speed(2, 1),
            "compressed": lambda: speed(2, 1, "compress_gradients=true"),
        }
    )
    against = f"1 process of 2 threads, {precision}"
    return [
        Row("2 ranks of 1 thread", against, "≥0.95", ratios(found["two"], found["one"])),
        Row("2 ranks, compress_gradients=true", against, "", ratios(found["compressed"], found["one"])),
    ]


def epoch(source: Path, work: Path) -> list[Row]:
    """The second of two epochs, with its test, pictures and saved weights."""
    folder = originals(source, work / "epoch", 160, 32)
    shards = write_shards(folder, work / "epoch_shards", Preprocessing(224)).path
    precision = best_precision()

    def plain() -> float:
        told = run([sys.executable, "benchmarks/baseline.py", str(folder), str(work / "plain"), "--epochs", "2"])
        return float(json.loads(told.splitlines()[-1])["epoch_s"])

    def ours(*options: str) -> float:
        shutil.rmtree(work / "run", ignore_errors=True)
        run(train_command(shards, work / "run", f"precision={precision}", "epochs=2", "log_every=5", *options))
        seconds = json.loads((work / "run" / "efficiency.json").read_text())["seconds"]
        first, _ = read_records(work / "run" / "speed.jsonl")
        return float(sum(seconds.values()) - first["elapsed_s"])  # what ends the first epoch counts as the second's

    found = interleaved({"plain": plain, "ours": ours, "compiled": lambda: ours("compile=default")})
    against = "plain, from originals"
    note = f"{precision}; a step takes nearly all of the time (see above)"
    return [
        Row("second epoch", against, "≥3", ratios(found["plain"], found["ours"]), note=note),
        Row("second epoch, compiled", against, "", ratios(found["plain"], found["compiled"]), note=note),
    ]


def lost(source: Path, work: Path) -> list[Row]:
    """One epoch of Kaggle's size: what is neither data, nor step, nor the test loss."""
    _, shards = kaggle_sized(source, work)
    shutil.rmtree(work / "run", ignore_errors=True)
    told = run(train_command(shards, work / "run", f"precision={best_precision()}", "epochs=1"))
    seconds = json.loads((work / "run" / "efficiency.json").read_text())["seconds"]
    share = 100 * sum(seconds[kind] for kind in ("log", "pictures", "checkpoint")) / sum(seconds.values())
    note = next(line for line in told.splitlines() if "images/s; time:" in line)
    return [Row("lost to logging, samples, checkpoints", "the run's time", "≤3", [share], unit="%", note=note)]


def generation(source: Path, work: Path) -> list[Row]:
    """Images a second of `cxr-vae generate`, PNGs and start included, from the run that `lost` left."""
    if not (work / "run" / "vae_final.safetensors").is_file():
        lost(source, work)
    out = work / "generated"

    def ours() -> float:
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        run([sys.executable, "-m", "cxr_vae", "generate", str(work / "run"), "--num", "1024", "--out", str(out)])
        return 1024 / (time.perf_counter() - begun)

    values = interleaved({"ours": ours}, 3)["ours"]
    return [Row("generation of 1,024 PNGs, start included", "", "", values, unit="images/s")]
