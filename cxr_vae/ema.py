"""The exponential moving average of a network's weights and batch-norm statistics (Polyak and Juditsky, 1992)."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class Ema:
    """A copy of `model` whose weights follow the model's: w ← decay · w + (1 - decay) · model's, at each update.

    The first update takes the model's weights as they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor | float = 1.0, *, first: bool = False) -> None:
        """`share` of an update, on the model's device: 1 or 0 (none)."""
        averages, currents = _floats(self.module), _floats(model)
        moves = torch._foreach_sub(currents, averages)
        torch._foreach_mul_(moves, (1.0 if first else 1 - self.decay) * share)
        torch._foreach_add_(averages, moves)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(current)  # a count


def _floats(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
