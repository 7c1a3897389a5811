"""What the memorisation audit compares images by: a small copy of each image and its features, kept on disk in blocks.

A block of real images is described once, by whichever rank it falls to, and published by a rename; so a job that was
killed goes on where it was, a second audit reads what the first computed, and memory holds a block at a time.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from cxr_vae.console import Progress
from cxr_vae.dataset import XrayDataset
from cxr_vae.distributed import World
from cxr_vae.features import FeatureNetwork
from cxr_vae.files import write_atomically
from cxr_vae.index import SplitIndex

SIDE = 32
"""Of the small copies, in pixels: at 224 px each is the mean of 7 x 7, which hides noise and compression."""

NUM_PER_BLOCK = 512
BATCH = 64


class Fingerprints(NamedTuple):
    """Of N images: small copies (N, S, S) of grey levels 0…255 and pooled features (N, D), float32 on the CPU."""

    small: Tensor
    pooled: Tensor


def small_copies(images: Tensor) -> Tensor:
    """(N, 1, H, W) uint8 as (N, S, S) float32, each pixel the mean over its area; S is 32, or H where that is less."""
    return F.adaptive_avg_pool2d(images.float(), min(SIDE, images.shape[-1]))[:, 0]


def fingerprint(images: Tensor, network: FeatureNetwork) -> Fingerprints:
    """Fingerprints of (N, 1, H, W) uint8 images."""
    parts = [(small_copies(batch), network(batch).pooled) for batch in images.split(BATCH)]
    return Fingerprints(torch.cat([small for small, _ in parts]), torch.cat([pooled for _, pooled in parts]))


def join(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Several sets one after another."""
    return Fingerprints(torch.cat([part.small for part in parts]), torch.cat([part.pooled for part in parts]))


class SplitFingerprints:
    """Fingerprints of a split's images by row, in blocks of 512 below `folder`, under a name made from their content.

    That name is the hash of the index (which names every image by its SHA-256), the network, its weights and the size
    of the small copies: another split or network never finds these files.
    """

    def __init__(self, index: SplitIndex, network: FeatureNetwork, folder: Path) -> None:
        identity = json.dumps([index.content_hash, network.name, network.weights_sha256, SIDE, NUM_PER_BLOCK])
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.dataset = XrayDataset(index, in_memory=False, workers=1)
        self.network = network

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_blocks(self) -> int:
        """512 images each, the last one fewer."""
        return -(-len(self) // NUM_PER_BLOCK)

    def prepare(self, here: World) -> None:
        """Describes what isn't yet described, every rank its part of the blocks; returns when all are done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        first, last = here.slice(0, self.num_blocks)
        with Progress(len(self), f"describe {self.dataset.index.split} images", enabled=here.is_main) as progress:
            for number in range(first, last):
                progress.advance(len(self.block(number).small) * here.size)
        here.barrier()

    def block(self, number: int) -> Fingerprints:
        """Of the rows 512 · number … 512 · number + 511, from the disk if they are there."""
        rows = np.arange(number * NUM_PER_BLOCK, min((number + 1) * NUM_PER_BLOCK, len(self)))
        path = self.folder / f"{number:06d}.safetensors"
        try:
            return Fingerprints(**load(path.read_bytes()))
        except (FileNotFoundError, SafetensorError, TypeError):  # not yet, or not whole
            found = fingerprint(self.dataset.images(rows), self.network)
            write_atomically(path, save({name: part.contiguous() for name, part in found._asdict().items()}))
            return found

    def rows(self, rows: npt.NDArray[np.int64]) -> Fingerprints:
        """Of these rows, which ascend."""
        parts = []
        for number in np.unique(rows // NUM_PER_BLOCK):
            places = torch.from_numpy(rows[rows // NUM_PER_BLOCK == number] - number * NUM_PER_BLOCK)
            block = self.block(int(number))
            parts.append(Fingerprints(block.small[places], block.pooled[places]))
        return join(parts)
