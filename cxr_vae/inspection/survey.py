"""One pass over the images of a shard directory: what `cxr-vae inspect` needs to know of each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr_vae.console import Progress
from cxr_vae.data.dataset import XrayDataset, read_ahead
from cxr_vae.data.index import ShardDirectory, SplitIndex
from cxr_vae.inspection.duplicates import small_copies
from cxr_vae.workers import num_cores

FLAT_RANGE = 8
"""Grey levels that a row or column of a constant border spans at most: JPEG's noise."""

AT_ONCE = 256


@dataclass(frozen=True)
class Survey:
    """All N images of all splits, one split after another."""

    splits: tuple[str, ...]
    classes: tuple[str, ...]
    split: npt.NDArray[np.int64]
    """(N,) number of the split."""
    label: npt.NDArray[np.int64]
    patient: npt.NDArray[np.str_]
    source: list[str]
    width: npt.NDArray[np.int64]
    """(N,) of the originals, in pixels, as is `height`."""
    height: npt.NDArray[np.int64]
    file_hash: npt.NDArray[np.uint8]
    """(N, 32) SHA-256 of the originals; `pixel_hash` is that of the stored pixels."""
    pixel_hash: npt.NDArray[np.uint8]
    borders: npt.NDArray[np.int64]
    """(N, 4) width of the constant border in stored pixels: top, bottom, left, right."""
    copies: Tensor
    """(N, D) small copies (`duplicates.small_copies`)."""
    datasets: tuple[XrayDataset, ...]

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First image of each split."""
        return np.searchsorted(self.split, np.arange(len(self.splits)))

    def images(self, numbers: Sequence[int]) -> Tensor:
        """(B, 1, S, S) uint8 images by number."""
        parts = []
        for number in numbers:
            split = int(self.split[number])
            parts.append(self.datasets[split].images([int(number - self.starts[split])]))
        return torch.cat(parts)

    def groups(self) -> Iterator[tuple[str, str, npt.NDArray[np.int64]]]:
        """Split, class and the numbers of its images, where there are any."""
        for split, split_name in enumerate(self.splits):
            for label, label_name in enumerate(self.classes):
                numbers = np.flatnonzero((self.split == split) & (self.label == label))
                if len(numbers):
                    yield split_name, label_name, numbers


def survey(directory: ShardDirectory, workers: int | None = None) -> Survey:
    """Reads every image once, with as many threads as cores by default. Raises UserError where shards are damaged."""
    indexes = [directory.split(name) for name in directory.manifest["splits"]]
    datasets = [XrayDataset(index, in_memory=False, workers=workers or num_cores()) for index in indexes]
    hashes, borders, copies = [], [], []
    with Progress(sum(map(len, indexes)), "inspect") as progress:
        for dataset in datasets:
            count = len(dataset)
            slices = (np.arange(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE))
            with read_ahead(dataset, slices) as batches:
                for images in batches:
                    hashes += [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
                    borders.append(constant_borders(images))
                    copies.append(small_copies(images))
                    progress.advance(len(images))
    widths, heights = (_joined(indexes, name) for name in ("width", "height"))
    measured = torch.cat(borders).numpy()
    if directory.manifest["fit"] == "letterbox":
        measured = np.maximum(measured - letterbox_bars(widths, heights, indexes[0].image_size), 0)
    return Survey(
        splits=tuple(index.split for index in indexes),
        classes=tuple(directory.manifest["classes"]),
        split=np.repeat(np.arange(len(indexes)), [len(index) for index in indexes]),
        label=_joined(indexes, "label"),
        patient=np.array([patient for index in indexes for patient in index.texts("patient")]),
        source=[source for index in indexes for source in index.texts("source")],
        width=widths,
        height=heights,
        file_hash=np.concatenate([index.numbers("sha256") for index in indexes]),
        pixel_hash=np.array([list(digest) for digest in hashes], np.uint8),
        borders=measured,
        copies=torch.cat(copies),
        datasets=tuple(datasets),
    )


def _joined(indexes: Sequence[SplitIndex], name: str) -> npt.NDArray[np.int64]:
    return np.concatenate([index.numbers(name) for index in indexes]).astype(np.int64)


def constant_borders(images: Tensor) -> Tensor:
    """(B, 4) pixels at the top, bottom, left and right of (B, 1, S, S) uint8 images that are one grey, row by row."""
    picture = images[:, 0]
    sides = []
    for dim in (2, 1):  # rows, columns
        flat = ((picture.amax(dim).int() - picture.amin(dim).int()) <= FLAT_RANGE).int()
        sides += [flat.cumprod(1).sum(1), flat.flip(1).cumprod(1).sum(1)]
    return torch.stack(sides, dim=1)


def letterbox_bars(width: npt.NDArray[np.int64], height: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """(N, 4) the bars that sharding with `fit=letterbox` adds: top, bottom, left, right, as PIL's ImageOps.pad does."""
    longer = np.maximum(width, height)
    spare_x, spare_y = (size - np.rint(side * size / longer).astype(np.int64) for side in (width, height))
    top, left = np.rint(spare_y / 2).astype(np.int64), np.rint(spare_x / 2).astype(np.int64)
    return np.stack([top, spare_y - top, left, spare_x - left], axis=1)
