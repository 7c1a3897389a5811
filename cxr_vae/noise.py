"""Random numbers that are a function of (seed, purpose, position), so that none is ever saved.

Positions are drawn in blocks of a fixed size, each with a generator seeded by the hash of (seed, purpose, block). So
the number at a position depends on nothing else: not on the batch it falls in, the rank that asks or what was drawn
before. Within a machine type and torch version the bits are the same too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

BLOCK = 64

PURPOSES = (
    *("weights", "train", "test", "grid", "generate", "importance"),
    *("label", "component", "prior_weights", "posterior", "prior_noise", "prior_uniform"),
)
"""Streams of numbers that must not depend on one another; new ones go to the end, since the place enters the hash."""


def seed_of(seed: int, purpose: str, block: int = 0) -> int:
    """A 64-bit seed: the hash of the arguments (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose), block]).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, purpose: str, block: int = 0) -> Iterator[None]:
    """Context in which torch's own random numbers, such as those of new layers, are a function of the arguments."""
    with torch.random.fork_rng(devices=[]):  # leaves the global random state alone
        torch.manual_seed(seed_of(seed, purpose, block))
        yield


def normal(
    seed: int, purpose: str, start: int, stop: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal float32 noise (stop - start, *shape) of the positions start…stop of a stream."""
    if stop <= start:
        return torch.empty(0, *shape, device=device)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    generator = torch.Generator(device)
    blocks = []
    for block in range(first, last + 1):
        generator.manual_seed(seed_of(seed, purpose, block))
        blocks.append(torch.randn(BLOCK, *shape, generator=generator, device=device))
    noise = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return noise[start - first * BLOCK : stop - first * BLOCK]


def uniform(seed: int, purpose: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform float32 numbers (stop - start,) in (0, 1), likewise: the normal distribution function of `normal`."""
    share: Tensor = torch.special.ndtr(normal(seed, purpose, start, stop, (), device).double())
    return share.float().clamp(1e-7, 1 - 1e-7)
