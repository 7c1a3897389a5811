"""Images that are the same, or nearly: equal hashes, and correlation after alignment.

X-rays of different people look alike: plain correlation between them reaches 0.97. What tells them apart is fine
structure, so images are compared after their smooth part is taken away. First all pairs by small copies (one matrix
product, in blocks), then the few candidates at a finer grid, at every small shift.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

SMALL_SIDE = 32
FINE_SIDE = 112
SMALL_BLUR, FINE_BLUR = 5, 9
"""Pixels of the box whose mean is the smooth part that is taken away."""

CANDIDATE_CORRELATION = 0.75
"""Of small copies. Shifts by 1 % of the side down and right leave 0.82 or more, by 2 % too little."""

NEAR_CORRELATION = 0.75
"""After alignment. On 5,856 X-rays of children, unrelated pairs reached 0.62; copies that were shifted, brightened,
compressed or shrunk and enlarged kept 0.84 or more."""

FLAT = 0.5
"""Grey levels: fine structure weaker than this (root mean square) is no picture to compare."""

BLOCK = 1024


def equal_groups(hashes: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Rows of (N, width) hashes that are equal, as groups of at least two."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, value in enumerate(hashes):
        groups[value.tobytes()].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def fine_structure(images: Tensor, side: int, blur: int) -> Tensor:
    """(B, 1, S, S) as (B, s, s) float32 less their local mean; s is `side`, or S where that is smaller."""
    side = min(side, images.shape[-1])
    small = F.interpolate(images.float(), size=(side, side), mode="area")
    padded = F.pad(small, (blur // 2,) * 4, mode="reflect")
    return (small - F.avg_pool2d(padded, blur, 1))[:, 0]


def small_copies(images: Tensor) -> Tensor:
    """(B, 1, S, S) as (B, D) float32 unit vectors whose products are correlations; zero where there is no structure."""
    return _normalised(fine_structure(images, SMALL_SIDE, SMALL_BLUR).flatten(1))


def _normalised(vectors: Tensor) -> Tensor:
    centred = vectors - vectors.mean(1, keepdim=True)
    norms = centred.norm(dim=1, keepdim=True)
    flat = norms < FLAT * vectors.shape[1] ** 0.5
    return torch.where(flat, torch.zeros(()), centred / norms.clamp_min(1e-12))


def candidate_pairs(copies: Tensor, limit: int) -> tuple[npt.NDArray[np.int64], float]:
    """(P, 2) row pairs of (N, D) `copies` that correlate, the strongest `limit` at most, and from which correlation on.

    Works block by block: time grows with N², memory doesn't.
    """
    least = CANDIDATE_CORRELATION
    pairs, values = torch.empty(0, 2, dtype=torch.long), torch.empty(0)
    for start in range(0, len(copies), BLOCK):
        for other in range(start, len(copies), BLOCK):
            products = copies[start : start + BLOCK] @ copies[other : other + BLOCK].T
            if start == other:
                products = products.triu(1)
            found = (products >= least).nonzero()
            pairs = torch.cat([pairs, found + torch.tensor([start, other])])
            values = torch.cat([values, products[found[:, 0], found[:, 1]]])
            if len(values) > 2 * limit:
                pairs, values, least = _strongest(pairs, values, limit)
    if len(values) > limit:
        pairs, values, least = _strongest(pairs, values, limit)
    order = torch.argsort(values, descending=True, stable=True)
    return pairs[order].numpy(), least


def _strongest(pairs: Tensor, values: Tensor, limit: int) -> tuple[Tensor, Tensor, float]:
    values, kept = values.topk(limit)
    return pairs[kept], values, float(values.min())


def aligned_correlation(first: Tensor, second: Tensor) -> Tensor:
    """(B,) correlations of the fine structure of (B, 1, S, S) images with that of others, at the best shift.

    Shifts go up to 1/28 of the side, 8 pixels of 224, in steps of 1/112.
    """
    a, b = (fine_structure(images, FINE_SIDE, min(FINE_BLUR, images.shape[-1] // 8 | 1)) for images in (first, second))
    side = a.shape[-1]
    reach = max(2, side // 28)
    inner = side - 2 * reach
    template = _normalised(a[:, reach:-reach, reach:-reach].flatten(1))
    best = torch.zeros(len(a))
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            window = _normalised(b[:, down : down + inner, right : right + inner].flatten(1))
            best = torch.maximum(best, (template * window).sum(1))
    return best


def near_pairs(
    copies: Tensor, rows: npt.NDArray[np.int64], fetch: Callable[[Sequence[int]], Tensor], batch: int = 64
) -> tuple[list[tuple[float, int, int]], float]:
    """Nearly equal pairs, the most alike first, and the correlation of small copies looked at from.

    A pair is its correlation at the best shift and the numbers of the two images.

    `copies` (N, D) are those of the images with the numbers `rows`, none of which should be equal; `fetch` returns
    (B, 1, S, S) uint8 images by number.
    """
    candidates, least = candidate_pairs(copies, limit=20_000 + len(rows) // 4)
    found = []
    for start in range(0, len(candidates), batch):
        pairs = rows[candidates[start : start + batch]]
        correlations = aligned_correlation(fetch(pairs[:, 0].tolist()), fetch(pairs[:, 1].tolist()))
        found += [
            (round(float(value), 4), int(first), int(second))
            for (first, second), value in zip(pairs, correlations, strict=True)
            if value >= NEAR_CORRELATION
        ]
    return sorted(found, key=lambda pair: (-pair[0], *pair[1:])), least
