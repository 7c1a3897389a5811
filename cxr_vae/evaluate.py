"""Generated images against real ones: `cxr-vae evaluate`, a job of its own, never part of training.

Every rank makes or reads its part of the images, writes them as PNGs and extracts their features; the first rank puts
the features in order, computes the figures and writes `evaluation_results.json` last.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.config_file import override_config
from cxr_vae.console import Progress
from cxr_vae.dataset import XrayDataset, open_split
from cxr_vae.distributed import World, world
from cxr_vae.errors import UserError
from cxr_vae.export import load_vae
from cxr_vae.features import FeatureNetwork, Features, choose_network, load_network
from cxr_vae.files import read_json, sha256_of, write_json
from cxr_vae.generate import claim, my_blocks, sample, write_images
from cxr_vae.index import SplitIndex
from cxr_vae.metrics import NAMES, Figure, check_counts, compare, inception_score
from cxr_vae.noise import BLOCK
from cxr_vae.run_dir import RunDir
from cxr_vae.stream import TrainingStream

MAY_OVERRIDE = ("evaluate", "device", "data.shards", "data.workers")


@dataclass(frozen=True)
class ImageSet:
    """Images to be measured: `fetch(start, stop)` gives (n, 1, H, W) uint8 of those at start…stop of `num`."""

    name: str
    num: int
    fetch: Callable[[int, int], Tensor]
    folder: Path | None
    """Where they are written as PNGs; None: nowhere."""
    facts: dict[str, Any]
    """What they are, for the record."""


def evaluate(run: RunDir, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluates a finished run and returns the content of its `evaluation_results.json`.

    A run that was evaluated with the same weights and options already is not evaluated again. Raises UserError where
    weights (of the run or the feature network), shards or enough images are missing: at the start.
    """
    config = override_config(run.saved_config(), overrides, MAY_OVERRIDE)
    with world(config.device) as here:
        model, _ = load_vae(run.weights, here.device)
        real_index, floor_index = open_splits(config)
        num_real = min(config.evaluate.num_real, len(real_index))
        num_floor = min(config.evaluate.num_generated, len(floor_index))
        check_counts(num_real, num_floor, config.evaluate)
        network_name = here.broadcast(choose_network(config.evaluate.features) if here.is_main else None)
        request = {
            "run_weights_sha256": sha256_of(run.weights),
            "seed": config.seed,
            "evaluate": config.evaluate.model_dump() | {"features": network_name},
            "index_hashes": [real_index.content_hash, floor_index.content_hash],
        }
        done = here.broadcast(earlier_results(run, request) if here.is_main else None)
        if done:
            return dict(done)
        if here.is_main and num_real < config.evaluate.num_real:
            print(f"the {real_index.split} split has {num_real} images, not {config.evaluate.num_real}: all are used")

        started = time.perf_counter()
        network = load_network(network_name, here.device)

        def draw(start: int, stop: int) -> Tensor:
            return sample(model, config.seed, start, stop, here.device)

        generated = ImageSet(
            "generated",
            config.evaluate.num_generated,
            draw,
            run.evaluation / "generated",
            {"weights_sha256": request["run_weights_sha256"], "seed": config.seed, "prior": "standard normal"},
        )
        real = real_images(real_index, num_real, config, run.evaluation / "real")
        floor = real_images(floor_index, num_floor, config, None)
        features = [extract(images, network, here) for images in (generated, real, floor)]
        if not here.is_main:
            return {}
        results = results_of((generated, real, floor), features, network, config, request)
        results["elapsed_s"] = round(time.perf_counter() - started, 2)
        keep_earlier(run.results)
        write_json(run.results, results)
    return results


def open_splits(config: Config) -> tuple[SplitIndex, SplitIndex]:
    """The splits of the real images and of the floor; UserError where they are one: that floor would be 0."""
    names = (config.evaluate.real_split, config.evaluate.floor_split)
    if names[0] == names[1]:
        raise UserError(f"evaluate.floor_split and evaluate.real_split are both {names[0]}: name two different splits")
    return open_split(config.data, names[0]), open_split(config.data, names[1])


def real_images(index: SplitIndex, num: int, config: Config, folder: Path | None) -> ImageSet:
    """The first `num` of a split in an order drawn from the seed."""
    dataset = XrayDataset(index, in_memory=False, workers=1)
    rows: npt.NDArray[np.int64] = np.sort(TrainingStream(len(index), config.seed).rows(0, num))
    facts = {"split": index.split, "index_sha256": index.content_hash, "seed": config.seed}
    return ImageSet("real", num, lambda start, stop: dataset.images(rows[start:stop]), folder, facts)


def extract(images: ImageSet, network: FeatureNetwork, here: World) -> Features | None:
    """Features of a set in its order, on the first rank; every image once, over all ranks. Writes the PNGs too."""
    if images.folder and here.is_main:
        claim(images.folder, images.facts, replace=True)
        for path in images.folder.glob("*.png"):
            path.unlink()  # of an earlier, larger or broken-off evaluation
    here.barrier()
    what = f"{images.name} images" if images.folder else "floor images"
    mine: list[tuple[int, Features]] = []
    with Progress(images.num, what, enabled=here.is_main) as progress, ThreadPoolExecutor(4) as pool:
        for start in my_blocks(images.num, here):
            block = images.fetch(start, min(start + BLOCK, images.num))
            if images.folder:
                write_images(images.folder, start, block, pool)
            mine.append((start, network(block)))
            progress.advance(len(block) * here.size)
    gathered = here.gather(mine)
    if gathered is None:
        return None
    parts = [features for _, features in sorted(part for rank in gathered for part in rank)]
    features = Features(torch.cat([part.pooled for part in parts]), torch.cat([part.logits for part in parts]))
    assert len(features.pooled) == images.num, "an image was missed or counted twice"
    return features


def results_of(
    sets: Sequence[ImageSet],
    features: Sequence[Features | None],
    network: FeatureNetwork,
    config: Config,
    request: dict[str, Any],
) -> dict[str, Any]:
    """The content of evaluation_results.json: figures with interval, floor and counts, and their circumstances."""
    generated, real, floor = sets
    of_generated, of_real, of_floor = (one for one in features if one is not None)
    measured = compare(of_generated, of_real, config.evaluate)
    floors = (*compare(of_floor, of_real, config.evaluate)[:2], inception_score(of_real, config.evaluate))
    return {
        "figures": {
            name: figure_record(figure, floor_figure)
            for name, figure, floor_figure in zip(NAMES[network.name], measured, floors, strict=True)
        },
        "num_generated": generated.num,
        "num_real": real.num,
        "num_real_wanted": config.evaluate.num_real,
        "num_floor": floor.num,
        "generated": generated.facts,
        "real": real.facts,
        "floor": floor.facts
        | {"meaning": "real images of this split in place of the generated; for the score, the real images' own"},
        "interval": "value ± 1.96 standard errors of the delete-half jackknife, at these numbers of images",
        "features": network.facts(),
        "image_size": config.data.image_size,
        "versions": {name: version(name) for name in ("cxr-vae", "torch", "torch-fidelity", "numpy")},
        "request": request,
    }


def figure_record(figure: Figure, floor: Figure) -> dict[str, Any]:
    """One figure beside its floor."""
    return {
        "value": figure.value,
        "interval_95": list(figure.interval_95),
        "floor": floor.value,
        "floor_interval_95": list(floor.interval_95),
    }


def earlier_results(run: RunDir, request: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier evaluation, if it was asked for the same."""
    if not run.results.is_file():
        return None
    results: dict[str, Any] = read_json(run.results, hint="delete it and evaluate again")
    if results["request"] != request:
        return None
    print(f"{run.results}: already evaluated so", flush=True)
    return results


def keep_earlier(path: Path) -> None:
    """Renames results that are about to be replaced to evaluation_results.1.json, .2.json and so on."""
    if path.is_file():
        number = 1
        while (kept := path.with_suffix(f".{number}.json")).exists():
            number += 1
        path.rename(kept)
