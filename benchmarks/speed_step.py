"""The rows of benchmarks/speed.py about one training step.

Each kind of step runs in a process of its own, since it counts how a process takes its memory:

    python -m benchmarks.speed_step plain | precision=bf16 compile=default …

says that it is ready, then does a step for each line it is given, and prints the seconds.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.baseline import VAE, train_step
from benchmarks.speed import ROUNDS, Row, interleaved, ratios
from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config_file import load_config
from cxr_vae.distributed import World, world
from cxr_vae.precision import peak_flops
from cxr_vae.training.compilation import compiled, share_compiled
from cxr_vae.training.efficiency import flops_per_image
from cxr_vae.training.vae_step import VaeStep

CPU = torch.device("cpu")
BATCH = 32
LONGEST_STEP_S = 20.0
"""Of a kind of step that is measured."""

VARIANTS = {
    "bf16": ("≥2.3", "precision=bf16"),
    "bf16, compiled": ("≥2.6", "precision=bf16", "compile=default"),
    "fp32": ("", "precision=fp32"),
    "fp32, compiled": ("", "precision=fp32", "compile=default"),
}
"""Target and options."""


def our_step(here: World, *options: str) -> Callable[[], object]:
    """One of ours, from bytes to weights."""
    config = load_config(None, ["image_size=224", f"batch_size={BATCH}", *options])
    state = TrainState.create(config, here.device)
    step = VaeStep(config, state, compiled(state.model, config.train.compile), here)
    images = torch.randint(0, 256, (BATCH, 1, 224, 224), dtype=torch.uint8)
    noise = torch.randn(BATCH, 128)
    batch = (images, noise, torch.empty(0, dtype=torch.int64))
    return lambda: step(batch, 1.0, 1e-3)


def plain_step() -> Callable[[], object]:
    """One of the plain program, from floats to weights."""
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (BATCH, 1, 224, 224)).float() / 255
    return lambda: train_step(model, optimizer, images)


def serve(*options: str) -> None:
    """Steps on demand; the first ones, and what they compile, are done before."""
    with ExitStack() as stack:
        if options == ("plain",):
            step = plain_step()
        else:
            share_compiled()
            step = our_step(stack.enter_context(world("cpu")), *options)
        for _ in range(3):
            step()
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            print(time.perf_counter() - start, flush=True)


def served(stack: ExitStack, *options: str) -> Callable[[], float]:
    """Seconds of a step in a process of its own, which ends with `stack`."""
    call = [sys.executable, "-m", "benchmarks.speed_step", *options]
    process = stack.enter_context(
        subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    )
    stack.callback(process.kill)
    read, write = process.stdout, process.stdin
    assert read is not None
    assert write is not None
    assert read.readline() == "ready\n", f"{call} failed: run it"

    def timed() -> float:
        print(file=write, flush=True)
        return float(read.readline())

    return timed


def steps(source: Path, work: Path) -> list[Row]:
    """Wall time of a step on all cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    peaks = {name: peak_flops(CPU, name, 2048) for name in ("fp32", "bf16")}
    flops = flops_per_image(load_config(None, ["image_size=224"])) * BATCH
    variants = {name: options for name, (_, *options) in VARIANTS.items() if flops / peaks[name[:4]] < LONGEST_STEP_S}
    with ExitStack() as stack:
        timers = {"plain": served(stack, "plain")} | {
            name: served(stack, *options) for name, options in variants.items()
        }
        setting_up = time.perf_counter() - began
        found = interleaved(timers, ROUNDS + 2)
    limit = statistics.median(found["plain"]) / min(flops / peak for peak in peaks.values())
    rows = []
    for name, (target, *_) in VARIANTS.items():
        peak = peaks[name[:4]]
        if name not in variants:
            note = f"this CPU emulates {name[:4]} ({peak / 1e9:.2g} GFLOP/s): a step would take {flops / peak:.0f} s"
            rows.append(Row(f"training step, {name}", "plain fp32 step", target, [], note=note))
            continue
        rate = flops / statistics.median(found[name])
        note = f"{rate / peak:.0%} of what this CPU multiplies in {name[:4]} ({peak / 1e9:.0f} GFLOP/s)"
        against = ratios(found["plain"], found[name])
        rows.append(Row(f"training step, {name}", "plain fp32 step", target, against, note=note))
    rows[0].note += f"; no step can be more than {limit:.2f} × as fast as the plain one here; set-up {setting_up:.0f} s"
    return rows


if __name__ == "__main__":
    serve(*sys.argv[1:])
