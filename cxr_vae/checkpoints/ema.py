"""The exponential moving average of a network's weights and batch-norm statistics (Polyak and Juditsky, 1992)."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class Ema:
    """A copy of `model` whose weights follow the model's: w ← (1 - share) · w + share · model's, at each update.

    torch's AveragedModel asks its counter at each update whether it is the first, for which a GPU would be waited for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor | float) -> None:
        """With a share of 0, on the model's device, nothing changes."""
        averages, currents = _floats(self.module), _floats(model)
        moves = torch._foreach_sub(currents, averages)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(averages, moves)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(current)  # a count


def _floats(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
