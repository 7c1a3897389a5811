"""The watch on a step's numbers: a loss or gradient that is none must not reach the weights or a checkpoint."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-6
"""Of fp16's losses: a gradient that is infinite even then is no matter of the scale."""

NAMED = 4
"""Images that are named in a sentence; all of them stand in the record."""


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, ()."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def describe_nonfinite(step: int, images_by_rank: Sequence[Sequence[str]]) -> str:
    """What was no finite number in a step, in words; `images_by_rank` are those with such a loss."""
    images = [f"{image} (rank {rank})" for rank, names in enumerate(images_by_rank) for image in names]
    if not images:
        return f"step {step}: the gradient is no finite number, though the loss of every image is"
    more = f" and {len(images) - NAMED} more" if len(images) > NAMED else ""
    return f"step {step}: the loss is no finite number for {', '.join(images[:NAMED])}{more}"
