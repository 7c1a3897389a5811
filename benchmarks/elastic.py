"""A run whose number of processes changes on the way, against the same run on 1 process and on 4 throughout.

    python -m benchmarks.elastic SHARDS [--steps 40]

The run is stopped after each quarter of its steps and started again from its checkpoint with another number of
processes: 4, 2, 3 and 1. Each rank records the ids of the images it trains on and the SHA-256 of the noise it draws for
each; a step's are the ranks' one after another, and should be those of the run on 1 process. Losses and final weights
should differ by rounding alone with group norm; batch norm's statistics are a rank's own, so there they differ more.
Exits with 1 where ids or noise differ, or a loss of group norm in fp32 by more than 1e-4 of itself.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor

from cxr_vae.config_file import load_config
from cxr_vae.console import Progress
from cxr_vae.data.index import ShardDirectory
from cxr_vae.distributed import World, world
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_records
from cxr_vae.training.train import Training

ELASTIC = (4, 2, 3, 1)
MODELS = (("group", "fp32"), ("group", "bf16"), ("batch", "fp32"))
BATCH = 24
TOLERANCE = 1e-4
"""Of a loss, with group norm in fp32."""


def leg(here: World, folder: Path, stop: int, options: list[str]) -> None:
    """Runs on each rank: trains from the newest checkpoint up to step `stop` and saves."""
    config = load_config(None, options)
    training = Training(config, RunDir(Path(config.run_dir)), here)
    sources = training.train_set.index.texts("source")
    noise: list[Tensor] = []
    training.state.model.register_forward_pre_hook(lambda _, inputs: noise.append(inputs[1]))
    steps = {}
    for rows in training.slices():
        if training.state.step == stop:
            break
        training.log_step(training.step(training.train_set.images(rows)), Progress(0, "train", enabled=False))
        digests = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in noise.pop()]
        steps[training.state.step] = {"ids": [sources[row] for row in rows], "noise": digests}
    training.checkpoints.save(training.state)
    training.checkpoints.wait()
    (folder / f"from{min(steps):06d}-rank{here.rank}.json").write_text(json.dumps(steps))
    if here.is_main:
        save_file(training.state.model.state_dict(), folder / "weights.safetensors")
    training.close()


@dataclass
class Run:
    """What a finished run leaves, step by step."""

    ids: list[list[str]]
    noise: list[list[str]]
    losses: list[float]
    weights: dict[str, Tensor]


def train(folder: Path, shards: str, legs: list[tuple[int, int]], options: list[str]) -> Run:
    """A run in legs of (processes, last step)."""
    folder.mkdir()
    options = [*options, f"data.shards={shards}", f"run_dir={folder / 'run'}"]
    for ranks, stop in legs:
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        call += [shards, "--leg", str(folder), str(stop), *options]
        done = subprocess.run(
            call, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            sys.exit(f"{ranks} processes up to step {stop} failed:\n{done.stderr}")
    steps: dict[int, dict[str, list[str]]] = {}
    for path in sorted(folder.glob("from*.json")):  # of a leg, in the order of the ranks
        for step, parts in json.loads(path.read_text()).items():
            found = steps.setdefault(int(step), {"ids": [], "noise": []})
            for name, values in parts.items():
                found[name] += values
    records = [record for record in read_records(RunDir(folder / "run").metrics) if record["kind"] == "step"]
    assert [record["step"] for record in records] == sorted(steps), "a step is missing or was done twice"
    return Run(
        [steps[step]["ids"] for step in sorted(steps)],
        [steps[step]["noise"] for step in sorted(steps)],
        [record["loss_nats"] for record in records],
        load_file(folder / "weights.safetensors"),
    )


def compare(run: Run, other: Run) -> dict[str, Any]:
    """How far `run` is from `other`. A weight's also relative to the largest weight of its tensor."""
    weights = {name: tensor for name, tensor in other.weights.items() if tensor.is_floating_point()}
    distances = {name: float((run.weights[name] - tensor).abs().max()) for name, tensor in weights.items()}
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(run.losses, other.losses, strict=True)),
        "absolute": max(distances.values()),
        "relative": max(distances[name] / float(tensor.abs().max()) for name, tensor in weights.items()),
        "ids": run.ids == other.ids,
        "noise": run.noise == other.noise,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--leg", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.leg:
        with world("cpu") as here:
            leg(here, Path(arguments.leg[0]), int(arguments.leg[1]), arguments.leg[2:])
        return 0
    if arguments.steps < len(ELASTIC):
        parser.error(f"--steps should be at least {len(ELASTIC)}, one for each number of processes")

    index = ShardDirectory.open(Path(arguments.shards)).split("train")
    steps = arguments.steps
    plans = {
        "1": [(1, steps)],
        "4": [(4, steps)],
        " → ".join(map(str, ELASTIC)): [
            (ranks, steps * number // len(ELASTIC)) for number, ranks in enumerate(ELASTIC, start=1)
        ],
    }
    options = [
        *(f"image_size={index.image_size}", f"fit={index.fit}", f"format={index.format}", "loading=shards"),
        *("model.channels=[16, 32, 64]", "latent_dim=16", f"batch_size={BATCH}", "log_every=1", "device=cpu"),
        f"epochs={steps * BATCH // len(index) + 1}",
    ]
    rows, wrong = [], []
    for norm, precision in MODELS:
        with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
            model = [*options, f"model.norm={norm}", f"precision={precision}"]
            runs = {
                ranks: train(Path(folder) / str(number), arguments.shards, legs, model)
                for number, (ranks, legs) in enumerate(plans.items())
            }
        for ranks, run in runs.items():
            if ranks == "1":
                continue
            found = compare(run, runs["1"])
            same = ["same" if found[name] else "DIFFER" for name in ("ids", "noise")]
            rows.append([norm, precision, ranks, found["loss"], found["absolute"], found["relative"], *same])
            if (norm, precision) == ("group", "fp32") and not found["loss"] <= TOLERANCE:
                wrong.append(f"{ranks} processes: a loss differs by {found['loss']:.1e} of itself")
            if "DIFFER" in same:
                wrong.append(f"{norm}, {precision}, {ranks} processes: ids or noise differ")
    headers = ["norm", "precision", "processes", "loss, relative", "weights", "weights, relative", "ids", "noise"]
    print(f"{steps} steps of {BATCH} images; largest differences from the run on 1 process\n")
    print(tabulate(rows, headers, floatfmt=".1e"))
    print("\n" + ("\n".join(wrong) or f"ids and noise the same; group norm in fp32 within {TOLERANCE} in every loss"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
