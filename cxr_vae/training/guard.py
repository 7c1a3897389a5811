"""The watch on a step's numbers: a loss or gradient that is none must not reach the weights or a checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler

SMALLEST_SCALE = 1e-6
"""Of fp16's losses: a gradient that is infinite even then is no matter of the scale."""

MOST_UNSEEN = 64
"""Steps: how late a GPU's run may learn that it has gone wrong. Nothing is saved or logged before it has."""

NAMED = 4
"""Images that are named in a sentence; all of them stand in the record."""


class Outcome(NamedTuple):
    """What became of a step; tensors on the device it ran on."""

    sums: Tensor
    """(2,) float64: reconstruction and KL in nats, summed over all ranks' images; (3,) with a discriminator's loss."""
    gradient_norm: Tensor
    """() of the gradient over all ranks."""
    finite: Tensor
    """(b,) bool: whether the loss of each of this rank's images is a finite number."""
    applied: Tensor
    """() bool, the same on all ranks: whether all was finite, and so the weights were changed."""


class UnseenOutcomes:
    """The outcomes nobody has looked at yet: on a GPU looking means waiting for it, so it is not done at every step."""

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._unseen: list[tuple[int, Outcome]] = []

    def add(self, step: int, outcome: Outcome) -> None:
        """What became of a step."""
        self._unseen.append((step, outcome))

    def is_due(self) -> bool:
        """Whether to look now, if there is no other reason to: looking on a CPU costs nothing."""
        return bool(self._unseen) and (
            len(self._unseen) >= MOST_UNSEEN or self._unseen[0][1].applied.device.type == "cpu"
        )

    def left_out(self) -> Iterator[tuple[int, Tensor]]:
        """Looks at all of them: the steps that changed nothing, with `finite` of each (on the CPU)."""
        unseen, self._unseen = self._unseen, []
        if not unseen or torch.stack([outcome.applied for _, outcome in unseen]).all():
            return
        # fp16's scaler looks at gradients itself and lowers the scale; where that doesn't help any more, it is as
        # without one.
        scaling = self._scaler.is_enabled() and self._scaler.get_scale() > SMALLEST_SCALE
        for step, outcome in unseen:
            if not outcome.applied and not (scaling and outcome.sums.isfinite().all()):
                yield step, outcome.finite.cpu()


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
