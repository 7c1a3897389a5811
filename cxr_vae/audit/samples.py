"""The images an audit looks at: those of the run's evaluation, a folder of PNGs, or new draws of the model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxr_vae.audit.rows import MIN_IMAGES
from cxr_vae.config import Config
from cxr_vae.data.images import UnreadableImageError, decode_grey
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.evaluation.image_sets import drawn_in_words, generated_images
from cxr_vae.files import read_json, sha256_of
from cxr_vae.noise import BLOCK
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.generate import MARKER
from cxr_vae.weights import load_vae


@dataclass(frozen=True)
class Samples:
    """Images by name; `fetch(start, stop)` gives (n, 1, H, W) uint8, where `start` is a multiple of 64."""

    names: Sequence[str]
    fetch: Callable[[int, int], Tensor]
    facts: dict[str, Any]
    """What they are, for the record."""

    def at(self, number: int) -> Tensor:
        """(H, W) uint8 of one."""
        start = number // BLOCK * BLOCK
        return self.fetch(start, number + 1)[number - start, 0]


def choose_samples(run: RunDir, config: Config, folder: Path | None, here: World) -> Samples:
    """The PNGs of `folder`; without one those of the run's evaluation, or as many drawn where it has none.

    Raises UserError where there are too few, one isn't of the run's image size, or the run has no weights to draw with.
    """
    samples = _choose(run, config, folder, here)
    if len(samples.names) < MIN_IMAGES:
        raise UserError(
            f"{samples.facts.get('folder', 'evaluate.num_generated')}: {len(samples.names)} images are too few for an "
            f"audit; give it {MIN_IMAGES} or more"
        )
    return samples


def in_words(facts: Mapping[str, Any]) -> str:
    """Which images they are: `generated images (prior: gmm (temperature 1.0))` or `PNGs in some/folder`."""
    if drawn := drawn_in_words(facts):
        return f"generated images (prior: {drawn})"
    return f"PNGs in {facts['folder']}" if "folder" in facts else "images"


def _choose(run: RunDir, config: Config, folder: Path | None, here: World) -> Samples:
    if folder is not None:
        return from_folder(folder, config.data.image_size)
    model, _ = load_vae(run.weights, here.device)
    images = generated_images(run, model, config, here.device)
    generated = run.evaluation / "generated"
    if (generated / MARKER).is_file():
        paths = sorted(generated.glob("*.png"))[: images.num]
        marker = read_json(generated / MARKER, hint=f"delete {generated}")
        if marker == images.facts and len(paths) == images.num:
            return from_files(paths, config.data.image_size, {"folder": str(generated), **images.facts})

    def draw(start: int, stop: int) -> Tensor:
        return torch.cat([images.fetch(at, min(at + BLOCK, stop))[0] for at in range(start, stop, BLOCK)])

    return Samples([f"{number:06d}" for number in range(images.num)], draw, images.facts)


def from_folder(folder: Path, image_size: int) -> Samples:
    """All PNGs of a folder, in the order of their names; other files are counted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --images takes a folder of PNGs of {image_size} x {image_size}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    paths = [path for path in files if path.suffix.lower() == ".png"]
    if not paths:
        raise UserError(f"{folder} holds no PNGs; --images takes a folder of PNGs of {image_size} x {image_size}")
    return from_files(paths, image_size, {"folder": str(folder), "num_other_files": len(files) - len(paths)})


def from_files(paths: Sequence[Path], image_size: int, facts: dict[str, Any]) -> Samples:
    """These PNGs; the facts get a hash over their contents."""
    digest = hashlib.sha256("".join(sha256_of(path) for path in paths).encode())

    def fetch(start: int, stop: int) -> Tensor:
        return torch.stack([read_png(path, image_size) for path in paths[start:stop]])

    return Samples([path.name for path in paths], fetch, facts | {"content_sha256": digest.hexdigest()})


def read_png(path: Path, image_size: int) -> Tensor:
    """(1, H, W) uint8 of a PNG, grey; UserError where it is none or of another size."""
    try:
        image = decode_grey(path.read_bytes())
    except UnreadableImageError as error:
        raise UserError(f"{path} can't be read ({error}): replace or remove it") from None
    if image.size != (image_size, image_size):
        raise UserError(
            f"{path} has {image.width} x {image.height} pixels, the run's images {image_size} x {image_size}: "
            "make the images at that size"
        )
    return torch.from_numpy(np.array(image, np.uint8))[None]
