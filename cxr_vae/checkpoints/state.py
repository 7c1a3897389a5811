"""All that training carries from one step to the next, as one object that is saved and loaded as a whole."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import pad
from torch.optim import Adam, AdamW, Optimizer

from cxr_vae.config import Config
from cxr_vae.models import build_discriminator, build_model
from cxr_vae.models.discriminator import PatchDiscriminator

OPTIMIZERS: dict[str, type[Adam] | type[AdamW]] = {"adam": Adam, "adamw": AdamW}


@dataclass
class Critic:
    """The discriminator that reconstructions are to deceive, and its optimizer."""

    model: PatchDiscriminator
    optimizer: Optimizer

    @classmethod
    def create(cls, config: Config, device: torch.device) -> "Critic | None":
        """As the configuration asks; None without an adversarial loss."""
        if not config.objective.adversarial_weight:
            return None
        model = build_discriminator(config)
        model = model.to(device, memory_format=memory_format(config, device))  # type: ignore[call-overload]
        # With less momentum, as is the habit (Radford et al., "DCGAN", 2016, section 4). While every patch is within
        # the hinge, real and fake cancel in the last bias's gradient but for rounding, of which Adam with a smaller
        # eps makes whole steps: another one for every number of ranks.
        return cls(model, make_optimizer("adam", model, config.optimizer.lr, betas=(0.5, 0.9), eps=1e-6))


@dataclass
class TrainState:
    """Weights, their running average, the optimizer and the place in the stream.

    Every rank holds the same: gradients and batch-norm statistics are averaged in each step. Learning rate, KL weight,
    order and noise are functions of `step` and `samples_seen`, so they are not part of it.
    """

    model: nn.Module
    optimizer: Optimizer
    critic: Critic | None
    scaler: GradScaler
    ema: nn.Module | None
    epoch_sums: Tensor
    """(3,) float64: reconstruction and KL, in nats, summed over the images of the epoch so far; their number."""
    lowest_test_loss: Tensor = field(default_factory=lambda: torch.tensor(torch.inf, dtype=torch.float64))
    """() float64, nats an image, of the epochs so far."""
    step: int = 0
    samples_seen: int = 0
    num_skipped: int = 0
    """Steps that were left out since their loss or gradient was no finite number."""

    @classmethod
    def create(cls, config: Config, device: torch.device, network: nn.Module | None = None) -> "TrainState":
        """The state before the first step, of `network` or else of the VAE that the configuration asks for."""
        model = build_model(config) if network is None else network
        model = model.to(device, memory_format=memory_format(config, device))  # type: ignore[call-overload]
        options = config.optimizer
        optimizer = make_optimizer(options.name, model, options.lr, weight_decay=options.weight_decay)
        ema = deepcopy(model).requires_grad_(False) if config.train.ema_decay else None
        scaler = GradScaler(device.type, enabled=config.train.precision == "fp16")
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        return cls(model, optimizer, Critic.create(config, device), scaler, ema, sums)

    def add(self, sums: Tensor, num_images: int, applied: Tensor, ema_share: Tensor | float) -> None:
        """Takes a step into the averages: `sums` (2,) of reconstruction and KL over its images, from all ranks.

        `ema_share`: of its weights in the running average (`schedules.ema_share`). Where it was not `applied` (), on
        the same device, nothing changes.
        """
        if self.ema is not None:
            follow(self.ema, self.model, applied.float() * ema_share)
        self.epoch_sums += torch.where(applied, pad(sums, (0, 1), value=num_images), 0.0)

    def count(self, num_images: int) -> None:
        """Counts a step of so many images, of all ranks."""
        self.step += 1
        self.samples_seen += num_images

    def end_epoch(self) -> tuple[Tensor, Tensor]:
        """Mean reconstruction and KL, () float64, over the images since the last call; starts the sums anew."""
        reconstruction, kl, _ = (self.epoch_sums / self.epoch_sums[2].clamp(min=1)).cpu()
        self.epoch_sums.zero_()
        return reconstruction, kl

    def is_best(self, test_loss: float) -> bool:
        """Whether no epoch had a lower test loss; remembers it."""
        best = test_loss < float(self.lowest_test_loss)
        if best:
            self.lowest_test_loss.fill_(test_loss)
        return best

    @property
    def averaged_model(self) -> nn.Module:
        """The weights to test and to export: the average where there is one."""
        return self.model if self.ema is None else self.ema

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors by name; loading into these tensors needs `load_state_dict` to take effect."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= moments("optimizer", self.model, self.optimizer)
        if self.critic is not None:
            tensors |= {f"critic.{name}": tensor for name, tensor in self.critic.model.state_dict().items()}
            tensors |= moments("critic_optimizer", self.critic.model, self.critic.optimizer)
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        tensors["epoch_sums"] = self.epoch_sums
        tensors["lowest_test_loss"] = self.lowest_test_loss
        tensors["counters"] = torch.tensor([self.step, self.samples_seen, self.num_skipped])
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self.model.load_state_dict(_below("model.", tensors))
        # Copied into what is there: fused Adam would mix up the elements of moments that are laid out in memory
        # otherwise than their weights, without a word (torch 2.15).
        here = moments("optimizer", self.model, self.optimizer)
        if self.critic is not None:
            self.critic.model.load_state_dict(_below("critic.", tensors))
            here |= moments("critic_optimizer", self.critic.model, self.critic.optimizer)
        for name, moment in here.items():
            moment.copy_(tensors[name])
        if self.ema is not None:
            self.ema.load_state_dict(_below("ema.", tensors))
        if self.scaler.is_enabled():
            scale, growth = tensors["scaler"].tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})
        self.epoch_sums.copy_(tensors["epoch_sums"])
        self.lowest_test_loss.copy_(tensors["lowest_test_loss"])
        self.step, self.samples_seen, self.num_skipped = tensors["counters"].tolist()


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, share: Tensor | float) -> None:
    """Moves weights and batch-norm statistics by a share towards the model's (Polyak and Juditsky, 1992); 0: not.

    torch's AveragedModel asks its counter at each update whether it is the first, for which a GPU would be waited for.
    """
    averages, currents = ([t for t in of.state_dict().values() if t.is_floating_point()] for of in (average, model))
    moves = torch._foreach_sub(currents, averages)
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(averages, moves)
    for mine, current in zip(average.buffers(), model.buffers(), strict=True):
        if not mine.is_floating_point():
            mine.copy_(current)  # a count


def moments(prefix: str, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """By parameter name: `<prefix>.state.to_mean.weight.exp_avg`. Settings follow from the configuration."""
    return {
        f"{prefix}.state.{name}.{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def make_optimizer(name: str, model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Of all parameters, fused, with its moments made; a GPU's can be captured in a graph."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    optimizer = OPTIMIZERS[name](model.parameters(), lr=lr, fused=True, capturable=on_gpu, **options)
    optimizer._warned_capturable_if_run_uncaptured = True  # of the first steps, which are not captured
    make_moments(optimizer)
    return optimizer


def make_moments(optimizer: Optimizer) -> None:
    """Makes the moments of a new fused optimizer, all 0, which else come to be in its first step only."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]  # a step that is none
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad()


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """The layout of weights and feature maps: what convolutions are fastest in, where the norms are right in it.

    On CPUs torch's own kernels of batch and group norm have errors of up to 3e-5 in channels_last, 100 times those
    in the other layout (torch 2.15); compiled ones don't.
    """
    channels_last = device.type == "cuda" or config.train.compile != "off"
    return torch.channels_last if channels_last else torch.contiguous_format


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
