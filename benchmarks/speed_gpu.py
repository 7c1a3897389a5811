"""How fast training is on one GPU, against the plain program and against what the GPU's memory allows.

    python -m benchmarks.speed_gpu DATA WORK [--seconds 300] [--only ceilings,steady,reference,plain,resume,evaluate]

DATA holds {train,test}/CLASS/*.jpeg, WORK is a new folder. Prints a table as soon as a part is done, and writes
WORK/speed_gpu.json. The images are those of DATA at 224 px; each rate is that of real runs of `cxr-vae train`, read
from their speed.jsonl: images/s between two lines of metrics, the first third left out.
"""

import argparse
import hashlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.speed import Row, machine, table_of
from cxr_vae.config_file import load_config
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.precision import peak_flops
from cxr_vae.training.run_log import read_records
from cxr_vae.training.train import train

GPU = torch.device("cuda")

BYTES_PER_IMAGE, BYTES_PER_STEP = 43.4e6, 516e6
"""What a step of the reference model must move through memory in bf16, with norms, ReLUs and loss fused into as few
passes as can be: activations of an image, forward and backward; weights, gradients and moments of a step."""

STEADY = [
    # batch, options, target in images/s, epochs
    (32, ("compile=off", "cuda_graph=false"), "", 4),
    (32, ("compile=off",), "", 8),
    (32, ("compile=default",), "≥25000", 16),
    (256, ("compile=off",), "", 12),
    (256, ("compile=default",), "≥40000", 30),
]


def ceilings(data: Path, work: Path) -> list[Row]:
    """Of this GPU: memory traffic of a large copy, and a large product of matrices."""
    source = torch.empty(2**32, dtype=torch.uint8, device=GPU).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rates = [2 * len(source) / seconds / 1e12 for seconds in times[2:]]
    flops = [peak_flops(GPU, "bf16", 8192) / 1e12 for _ in range(3)]
    return [
        Row("memory, read and written", "", "", rates, unit="TB/s"),
        Row("product of matrices, bf16", "", "", flops, unit="TFLOP/s"),
    ]


def shards(data: Path, work: Path) -> Path:
    """Of DATA, written once."""
    return write_shards(data, work / "shards", Preprocessing(224, "stretch", "raw")).path


def run(data: Path, work: Path, name: str, *options: str) -> Path:
    """A run in this process, from the beginning."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    base = [f"data.shards={shards(data, work)}", "data.format=raw", f"run_dir={folder}"]
    torch._dynamo.reset()  # which else gives up compiling at the eighth model
    if not train(load_config(Path("configs/reference.yaml"), [*base, *options])):
        raise SystemExit("told to stop")
    return folder


def steady(data: Path, work: Path) -> list[Row]:
    """Images a second in the middle of runs, and their share of what the memory allows."""
    (memory, *_) = ceilings(data, work)
    rows = []
    for batch, options, target, epochs in STEADY:
        quiet = ("grid_every=1000", "checkpoint.best=false", "log_every=32")
        try:
            folder = run(data, work, "steady", f"batch_size={batch}", f"epochs={epochs}", *options, *quiet)
        except Exception as error:  # the others are still worth knowing
            print(f"batch {batch}, {options}: {error!r}"[:2000], flush=True)
            continue
        rates = [record["images_per_s"] for record in read_records(folder / "speed.jsonl")]
        rates = rates[len(rates) // 3 :]
        limit = statistics.median(memory.values) * 1e12 / (BYTES_PER_IMAGE + BYTES_PER_STEP / batch)
        share = statistics.median(rates) / limit
        note = f"{share:.0%} of the {limit:,.0f} that memory allows; " + in_a_line(folder)
        rows.append(Row(f"batch {batch}, {', '.join(options)}", "", target, rates, unit="images/s", note=note))
        print(table_of(rows), flush=True)
    return rows


def in_a_line(folder: Path) -> str:
    """Where a run's time went."""
    return str(json.loads((folder / "efficiency.json").read_text())["in_a_line"])


def command(work: Path, name: str, *options: str) -> list[str]:
    """`cxr-vae train` of the reference, in a process of its own."""
    base = [f"data.shards={work / 'shards'}", "data.format=raw", f"run_dir={work / name}"]
    return [sys.executable, "-m", "cxr_vae", "train", "configs/reference.yaml", *base, *options]


def timed(call: Sequence[str]) -> float:
    """Seconds of a process from its start to its end; its last lines are printed."""
    start = time.perf_counter()
    done = subprocess.run(call, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    print("\n".join(done.stdout.splitlines()[-3:]), flush=True)
    return seconds


def reference(data: Path, work: Path) -> list[Row]:
    """The reference's 50 epochs at batch 32, from the start of the process to its final weights."""
    shards(data, work)
    rows = []
    for name, *options in (("reference",), ("reference_compiled", "compile=default")):
        shutil.rmtree(work / name, ignore_errors=True)
        seconds = timed(command(work, name, *options))
        rows.append(Row(f"50 epochs, {name}", "", "≤60", [seconds], unit="s", note=in_a_line(work / name)))
    return rows


def plain(data: Path, work: Path) -> list[Row]:
    """The plain program on the same images and GPU: its second epoch."""
    call = [sys.executable, "benchmarks/baseline.py", str(data), str(work / "plain"), "--epochs", "2"]
    start = time.perf_counter()
    told = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    record = json.loads(told.splitlines()[-1])
    rate = record["num_images"] / record["train_s"]
    note = f"two workers decode 224 px JPEGs; two epochs in {time.perf_counter() - start:.0f} s"
    return [Row("plain program, second epoch", "", "", [rate], unit="images/s", note=note)]


def resume(data: Path, work: Path) -> list[Row]:
    """Runs that are killed three times against ones that aren't: 1 where weights and metrics are the same bits."""
    shards(data, work)
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda name: resumed(work, name), RESUMED))
    eager, plain = (load_file(work / f"resume {name} whole" / "vae_final.safetensors") for name in list(RESUMED)[:2])
    same = all(torch.equal(eager[name], plain[name]) for name in eager)
    return [*rows, Row("weights, cuda_graph=true", "cuda_graph=false", "≥1", [float(same)], unit="equal")]


RESUMED = {"eager": (), "eager, cuda_graph=false": ("cuda_graph=false",), "compile=default": ("compile=default",)}


def resumed(work: Path, name: str) -> Row:
    """One kind of run."""
    quick = ("epochs=6", "grid_every=99", "checkpoint.every_steps=100", "checkpoint.best=false", "seed=3")
    digests = []
    for kind, steps in (("whole", ()), ("killed", (150, 420, 700))):
        folder = work / f"resume {name} {kind}"
        shutil.rmtree(folder, ignore_errors=True)
        call = command(work, folder.name, *quick, *RESUMED[name])
        for step in steps:
            kill_after(call, folder, step)
        timed(call)
        files = (folder / "vae_final.safetensors", folder / "metrics.jsonl")
        digests.append(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())
    return Row(f"killed three times, {name}", "undisturbed", "≥1", [float(len(set(digests)) == 1)], unit="equal")


def kill_after(call: Sequence[str], folder: Path, step: int) -> None:
    """Starts a run and kills it, without notice, when it has recorded `step`."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        records = read_records(folder / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def evaluate(data: Path, work: Path) -> list[Row]:
    """1,000 + 1,000 images from a trained run to figures, from the start of the process to its end; also once more."""
    call = [sys.executable, "-m", "cxr_vae", "evaluate", str(work / "reference"), "features=random"]
    call += ["real_split=train", "floor_split=test"]
    first = timed(call)
    second = timed([*call, "temperature=0.99"])
    return [
        Row("evaluate, 1,000 + 1,000 images", "", "≤15", [first], unit="s"),
        Row("evaluate, features of real images kept", "", "", [second], unit="s"),
    ]


PARTS: dict[str, Callable[[Path, Path], list[Row]]] = {
    "ceilings": ceilings,
    "steady": steady,
    "reference": reference,
    "evaluate": evaluate,
    "resume": resume,
    "plain": plain,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=600, help="begin no further part after this")
    parser.add_argument("--out", type=Path, help="JSON (default: WORK/speed_gpu.json)")
    arguments = parser.parse_args()

    began, rows = time.monotonic(), []
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        if time.monotonic() - began > arguments.seconds:
            print(f"no time left for {name}")
            continue
        start = time.monotonic()
        try:
            rows += PARTS[name](arguments.data, arguments.work)
        except Exception as error:  # what was measured so far is kept
            print(f"{name} failed: {error!r}"[:3000], flush=True)
        print(f"{table_of(rows)}\n{time.monotonic() - start:.0f} s: {name}", flush=True)
        facts: dict[str, Any] = machine() | {"images": str(arguments.data.name)}
        record = facts | {"rows": [row.__dict__ for row in rows]}
        (arguments.out or arguments.work / "speed_gpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
