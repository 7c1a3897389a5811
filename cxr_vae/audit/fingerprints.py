"""What the memorisation audit compares images by: a small copy of each image and its features."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cxr_vae.console import Progress
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import SplitIndex
from cxr_vae.distributed import World
from cxr_vae.evaluation.block_store import BlockStore
from cxr_vae.evaluation.features import FeatureNetwork
from cxr_vae.noise import BLOCK
from cxr_vae.sampling.generate import my_blocks

SIDE = 32
"""Of the small copies, in pixels: at 224 px each is the mean of 7 x 7, which hides noise and compression."""


class Fingerprints(NamedTuple):
    """Of N images: small copies (N, S, S) of grey levels 0…255 and pooled features (N, D), float32 on the CPU."""

    small: Tensor
    pooled: Tensor


def small_copies(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8 as (N, S, S) float32, each pixel the mean over its area; S is 32, or H where that is less."""
    return F.adaptive_avg_pool2d(images.float(), min(SIDE, images.shape[-1]))[:, 0]


def fingerprint(images: Tensor, network: FeatureNetwork) -> Fingerprints:
    """Fingerprints of (N, 1, H, W) uint8 images, N at most 64."""
    return Fingerprints(small_copies(images), network(images).pooled)


def join(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Several sets one after another."""
    return Fingerprints(torch.cat([part.small for part in parts]), torch.cat([part.pooled for part in parts]))


class SplitFingerprints:
    """Fingerprints of a split's images by row, kept in blocks of 64 by the content of the split and the network."""

    def __init__(self, index: SplitIndex, network: FeatureNetwork, root: Path) -> None:
        facts = {"side": SIDE, "index_sha256": index.content_hash, "features": network.facts()}
        self.store = BlockStore(root, {"fingerprints": facts})
        self.dataset = XrayDataset(index, in_memory=False, workers=1)
        self.network = network

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_blocks(self) -> int:
        """64 images each, the last one fewer."""
        return -(-len(self) // BLOCK)

    def prepare(self, here: World) -> None:
        """Describes what isn't yet described, every rank its part of the blocks; returns when all are done."""
        with Progress(len(self), f"describe {self.dataset.index.split} images", enabled=here.is_main) as progress:
            for start in my_blocks(len(self), here):
                progress.advance(len(self.block(start // BLOCK).small) * here.size)
        here.barrier()

    def block(self, number: int) -> Fingerprints:
        """Of the rows 64 · number … 64 · number + 63, as kept if they are."""
        start = number * BLOCK
        kept = self.store.load(start)
        if kept is None:  # not yet, or damaged
            rows = np.arange(start, min(start + BLOCK, len(self)))
            found = fingerprint(self.dataset.images(rows), self.network)
            kept = found._asdict()
            self.store.save(start, kept)
        return Fingerprints(**kept)

    def rows(self, rows: npt.NDArray[np.int64]) -> Fingerprints:
        """Of these rows, which ascend."""
        parts = []
        for number in np.unique(rows // BLOCK):
            places = torch.from_numpy(rows[rows // BLOCK == number] - number * BLOCK)
            block = self.block(int(number))
            parts.append(Fingerprints(block.small[places], block.pooled[places]))
        return join(parts)
