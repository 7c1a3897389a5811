"""One training step: the gradient over a whole batch and the update, without a wait for the device.

Whether a loss or gradient is no finite number decides on the device itself whether the weights change; the caller looks
at that later (`guard.UnseenOutcomes`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config import Config
from cxr_vae.distributed import World, gradients_stay_local
from cxr_vae.training.capture import Replayed
from cxr_vae.training.guard import Outcome, gradient_norm
from cxr_vae.training.schedules import ema_share


class Step(ABC):
    """Steps of one run; `model` is what `World.parallel` made of the state's."""

    num_terms = 2
    """That `losses` returns; `TrainState` adds up the first two."""

    def __init__(self, config: Config, state: TrainState, model: nn.Module, here: World) -> None:
        self.config, self.state, self.model, self.here = config, state, model, here
        # Only a step that may be left out needs the statistics of before.
        self._keeps_buffers = config.train.skip_nonfinite > 0 or state.scaler.is_enabled()
        self._updates: dict[str, Callable[..., Outcome]] = {}

    @abstractmethod
    def losses(
        self, batch: Sequence[Tensor], kl_weight: Tensor | float, *, last: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Terms to be reported and the loss to be minimised of each image of a micro-batch, (b,) float32 each.

        `last`: whether it is the last of the step, whose gradients are averaged over the ranks.
        """

    @property
    def phase(self) -> str:
        """What kind of step is next: each kind is captured by itself."""
        return ""

    def networks(self) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
        """What a step of this phase changes."""
        return [(self.state.model, self.state.optimizer)]

    def __call__(self, batch: Sequence[Tensor], kl_weight: float, lr: float) -> Outcome:
        """One update from this rank's part of a batch: tensors (b, …)."""
        share_in_average = ema_share(self.state.step, self.config.train.ema_decay)
        if self.phase not in self._updates:
            self._updates[self.phase] = Replayed(self.update, self.here.device) if self._is_captured else self.update
        outcome = self._updates[self.phase](*batch, *map(self._scalar, (kl_weight, lr, share_in_average)))
        self.state.count(self.config.train.batch_size)
        return outcome

    @property
    def _is_captured(self) -> bool:
        on_one_gpu = self.here.device.type == "cuda" and self.here.size == 1
        return self.config.train.cuda_graph and on_one_gpu and not self.state.scaler.is_enabled()

    def _scalar(self, value: float) -> Tensor | float:
        """A number that is another at each step, as the device takes it without waiting."""
        return value if self.here.device.type == "cpu" else torch.full((), value, device=self.here.device)

    def update(self, *arguments: Tensor) -> Outcome:
        """All of a step that the device does: from the batch, KL weight, learning rate and the average's share."""
        *batch, kl_weight, lr, share_in_average = arguments
        state, networks = self.state, self.networks()
        kept = [buffer.clone() for buffer in state.model.buffers()] if self._keeps_buffers else []
        sums, finite = self.backward(batch, kl_weight)
        norms = []
        for network, optimizer in networks:
            # Else fused Adam would silently mix up their elements.
            assert all(p.grad is None or _strides(p.grad) == _strides(p) for p in network.parameters())
            state.scaler.unscale_(optimizer)
            norms.append(gradient_norm(network.parameters()))
        # Sums and gradients are the same on all ranks, so all decide the same.
        applied = torch.stack([sums.isfinite().all(), *(norm.isfinite() for norm in norms)]).all()
        for _, optimizer in networks:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Fused optimizers leave everything as it is where this is 1.
            optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.scaler.update()
        self.here.average_buffers(state.model)
        for buffer, before in zip(state.model.buffers(), kept, strict=False):
            buffer.copy_(torch.where(applied, buffer, before))
        state.add(sums[:2], self.config.train.batch_size, applied, share_in_average)
        return Outcome(sums, norms[0], finite, applied)

    def backward(self, batch: Sequence[Tensor], kl_weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over the whole batch, on every rank; returns an outcome's sums and finite."""
        config, here = self.config, self.here
        self.state.model.train()
        sums = torch.zeros(self.num_terms, dtype=torch.float64, device=here.device)
        finite = []
        parts = list(zip(*(tensor.tensor_split(config.train.accumulate) for tensor in batch), strict=True))
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else gradients_stay_local(self.model):
                terms, loss = self.losses(part, kl_weight, last=last)
                self.state.scaler.scale(loss.sum() * self.share).backward()
            sums += torch.stack([term.detach().double().sum() for term in terms])
            finite.append(loss.detach().isfinite())
        return here.sum_(sums), torch.cat(finite)

    @property
    def share(self) -> float:
        """Factor of an image's loss in the mean over the global batch.

        Parts may be unequal, and gradients are averaged over the ranks.
        """
        return self.here.size / self.config.train.batch_size


def _strides(tensor: Tensor) -> list[int]:
    """Where the next element lies, along each axis that has one."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
