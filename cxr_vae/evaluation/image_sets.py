"""The sets of images that an evaluation measures, block by block: generated, real, and reconstructions of real ones."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.config_file import SAMPLING
from cxr_vae.console import Progress
from cxr_vae.data.dataset import XrayDataset, to_float
from cxr_vae.data.index import SplitIndex
from cxr_vae.data.stream import TrainingStream
from cxr_vae.distributed import World
from cxr_vae.evaluation.block_store import BlockStore
from cxr_vae.evaluation.bounds import measure
from cxr_vae.evaluation.features import FeatureNetwork
from cxr_vae.files import cache_folder
from cxr_vae.models import VAE
from cxr_vae.noise import BLOCK
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.generate import claim, my_blocks, path_of, wait, write_images
from cxr_vae.sampling.sampler import open_sampler

Block = tuple[Tensor, dict[str, Tensor]]


def usable_cache(run: RunDir) -> Path:
    """Where features of real images are shared among runs; within this one where that can't be written to."""
    folder = cache_folder() / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
    except OSError as error:
        print(f"{folder} can't be written to ({error.strerror}): features of real images are kept in this run only")
        return run.evaluation / "features"
    return folder


@dataclass(frozen=True)
class ImageSet:
    """Images to be measured, and what is measured of them."""

    name: str
    num: int
    fetch: Callable[[int, int], Block]
    """Those at start…stop of `num`, (n, 1, H, W) uint8, and tensors (n, …) of what is known of each beside features."""
    facts: dict[str, Any]
    """What they are a function of."""
    root: Path
    """Where their features are kept."""
    folder: Path | None = None
    """Where they are written as PNGs; None: nowhere."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the tensors depend on besides."""

    def store(self, network: FeatureNetwork) -> BlockStore:
        """Their features and tensors, by content."""
        return BlockStore(self.root, {"images": self.facts, "features": network.facts()} | self.extra)


def generated_images(run: RunDir, model: VAE, config: Config, device: torch.device) -> ImageSet:
    """Samples of the prior that `config` names, which `cxr-vae generate` would write too."""
    sampler = open_sampler(run, model, config, device, temperature=config.evaluate.temperature)

    def fetch(start: int, stop: int) -> Block:
        return sampler.draw(start, stop, device), {}

    num, evaluation = config.evaluate.num_generated, run.evaluation
    return ImageSet("generated", num, fetch, sampler.facts, evaluation / "features", evaluation / "generated")


def drawn_in_words(facts: Mapping[str, Any]) -> str:
    """What generated images were drawn from: `gmm (temperature 1.0)`; empty where that isn't known."""
    options = [f"{name} {facts[name]}" for name in ("temperature", *SAMPLING) if name in facts]
    return str(facts.get("prior", "")) + (f" ({', '.join(options)})" if options else "")


def real_images(index: SplitIndex, num: int, config: Config, folder: Path | None, root: Path) -> ImageSet:
    """`num` of a split, drawn at random from the seed, in stored order."""
    dataset, rows = XrayDataset(index, in_memory=False, workers=1), rows_of(index, num, config)

    def fetch(start: int, stop: int) -> Block:
        return dataset.images(rows[start:stop]), {}

    return ImageSet("real" if folder else "floor", num, fetch, facts_of(index, rows, config), root, folder)


def reconstructions(
    index: SplitIndex, num: int, run: RunDir, model: VAE, config: Config, weights_sha256: str, device: torch.device
) -> ImageSet:
    """The same real images through the model, with bounds on their likelihood."""
    dataset, rows = XrayDataset(index, in_memory=False, workers=1), rows_of(index, num, config)
    num_samples = config.evaluate.importance_samples

    def fetch(start: int, stop: int) -> Block:
        images = to_float(dataset.images(rows[start:stop]), device)
        labels = dataset.labels(rows[start:stop], device) if model.num_classes else None
        return measure(model, images, labels, start, config.seed, num_samples)

    facts = facts_of(index, rows, config) | {"weights_sha256": weights_sha256, "latent": "posterior mean"}
    extra = {"importance_samples": num_samples}
    return ImageSet("reconstructions", num, fetch, facts, run.evaluation / "features", extra=extra)


def first_images(index: SplitIndex, num: int, model: VAE, config: Config) -> tuple[Tensor, Tensor | None]:
    """The first block of the same `num`, (n, 1, H, W) float32, and classes (n,) where the decoder is told them."""
    dataset, rows = XrayDataset(index, in_memory=False, workers=1), rows_of(index, num, config)[:BLOCK]
    device = next(model.parameters()).device
    labels = dataset.labels(rows, device) if model.num_classes else None
    return to_float(dataset.images(rows), device), labels


def rows_of(index: SplitIndex, num: int, config: Config) -> npt.NDArray[np.int64]:
    """Which `num` rows of a split are looked at, at most all of them."""
    assert num <= len(index), f"{num} of {len(index)} images would be repeated"
    rows: npt.NDArray[np.int64] = np.sort(TrainingStream(len(index), config.seed).rows(0, num))
    return rows


def facts_of(index: SplitIndex, rows: npt.NDArray[np.int64], config: Config) -> dict[str, Any]:
    """What real images are a function of."""
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    return {"split": index.split, "index_sha256": index.content_hash, "seed": config.seed, "rows_sha256": digest}


def extract(images: ImageSet, network: FeatureNetwork, here: World) -> dict[str, Tensor] | None:
    """Features (and what else is known of each image) in order, on the first rank; None on the others.

    Every image once, over all ranks. Writes the PNGs too, while the network works. Blocks that are kept already, of an
    evaluation that was broken off or of another that looked at the same, are not computed again.
    """
    if images.folder and here.is_main:
        claim(images.folder, images.facts, replace=True)
        for path in images.folder.glob("*.png"):
            if int(path.stem) >= images.num:
                path.unlink()  # of an earlier, larger evaluation
    here.barrier()
    store = images.store(network)
    with Progress(images.num, f"{images.name} images", enabled=here.is_main) as progress, ThreadPoolExecutor(4) as pool:
        for start in my_blocks(images.num, here):
            stop = min(start + BLOCK, images.num)
            is_kept = store.num_at(start) >= stop - start
            if not is_kept or not written(images.folder, start, stop):
                block, tensors = images.fetch(start, stop)
                writing = write_images(images.folder, start, block, pool) if images.folder else []
                if not is_kept:
                    tensors |= network(block).tensors()
                wait(writing)
                if not is_kept:  # so features are there only if the PNGs are
                    store.save(start, tensors)
            progress.advance((stop - start) * here.size)
    here.barrier()
    return store.load_all(images.num) if here.is_main else None


def written(folder: Path | None, start: int, stop: int) -> bool:
    """Whether the PNGs of a block are there, if they are to be."""
    return folder is None or all(path_of(folder, number).is_file() for number in range(start, stop))
