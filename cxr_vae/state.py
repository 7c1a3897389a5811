"""All that training carries from one step to the next, as one object that is saved and loaded as a whole."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cxr_vae.config import Config
from cxr_vae.models import VAE, build_model

OPTIMIZERS: dict[str, type[Adam] | type[AdamW]] = {"adam": Adam, "adamw": AdamW}

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class TrainState:
    """Weights, their running average, the optimizer and the place in the stream.

    Every rank holds the same: gradients and batch-norm statistics are averaged in each step. Learning rate, KL weight,
    order and noise are functions of `step` and `samples_seen`, so they are not part of it.
    """

    model: VAE
    optimizer: Optimizer
    scaler: GradScaler
    ema: AveragedModel | None
    epoch_sums: Tensor
    """(2,) float64: reconstruction and KL, in nats, summed over the images of the current epoch so far ..."""
    epoch_images: int = 0
    """... and how many those are."""
    lowest_test_loss: Tensor = field(default_factory=lambda: torch.tensor(torch.inf, dtype=torch.float64))
    """() float64, nats an image, of the epochs so far."""
    step: int = 0
    samples_seen: int = 0
    num_skipped: int = 0
    """Steps that were left out since their loss or gradient was no finite number."""

    @classmethod
    def create(cls, config: Config, device: torch.device) -> "TrainState":
        """The state before the first step."""
        model = build_model(config).to(device)
        optimizer = OPTIMIZERS[config.optimizer.name](
            model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
        )
        # Made now, and not by the first step or the first save, which would count as a step.
        get_optimizer_state_dict(model, optimizer)
        for moments in optimizer.state.values():
            for moment in moments.values():
                moment.zero_()
        ema = None
        if config.train.ema_decay:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        scaler = GradScaler(device.type, enabled=config.train.precision == "fp16")
        return cls(model, optimizer, scaler, ema, torch.zeros(2, dtype=torch.float64, device=device))

    def advance(self, sums: Tensor, num_images: int) -> None:
        """Counts a step: `sums` (2,) of reconstruction and KL over its `num_images` images, from all ranks."""
        self.step += 1
        self.samples_seen += num_images
        self.epoch_sums += sums
        self.epoch_images += num_images
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def skip(self, num_images: int) -> None:
        """Counts a step over `num_images` images that changed nothing."""
        self.step += 1
        self.samples_seen += num_images
        self.num_skipped += 1

    def end_epoch(self) -> tuple[Tensor, Tensor]:
        """Mean reconstruction and KL, () float64, over the images since the last call; starts the sums anew."""
        reconstruction, kl = (self.epoch_sums / max(1, self.epoch_images)).cpu()
        self.epoch_sums.zero_()
        self.epoch_images = 0
        return reconstruction, kl

    def is_best(self, test_loss: float) -> bool:
        """Whether no epoch had a lower test loss; remembers it."""
        best = test_loss < float(self.lowest_test_loss)
        if best:
            self.lowest_test_loss.fill_(test_loss)
        return best

    @property
    def best_model(self) -> VAE:
        """The weights to test and to export: the average where there is one."""
        return self.model if self.ema is None else cast(VAE, self.ema.module)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors by name; loading into these tensors needs `load_state_dict` to take effect."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self._optimizer().items() if torch.is_tensor(value)}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        tensors["epoch_sums"] = self.epoch_sums
        tensors["lowest_test_loss"] = self.lowest_test_loss
        tensors["counters"] = torch.tensor([self.step, self.samples_seen, self.epoch_images, self.num_skipped])
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self.model.load_state_dict(_below("model.", tensors))
        set_optimizer_state_dict(
            self.model, self.optimizer, self._optimizer() | _below("optimizer.", tensors), options=_FLAT
        )
        if self.ema is not None:
            self.ema.load_state_dict(_below("ema.", tensors))
        if self.scaler.is_enabled():
            scale, growth = tensors["scaler"].tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})
        self.epoch_sums.copy_(tensors["epoch_sums"])
        self.lowest_test_loss.copy_(tensors["lowest_test_loss"])
        self.step, self.samples_seen, self.epoch_images, self.num_skipped = tensors["counters"].tolist()

    def _optimizer(self) -> dict[str, Any]:
        """Moments by parameter name, as tensors; and settings, which aren't and follow from the configuration."""
        return get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
