"""`flow`: RealNVP, affine couplings that turn latent vectors into noise and back (Dinh et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_vae.config import PriorConfig
from cxr_vae.errors import UserError
from cxr_vae.priors.base import Prior, normal_log_density

MOST_LOG_SCALE = 2.0
"""A coupling stretches by at most e² and shrinks by as much, so that its inverse stays exact in float32."""


class FlowPrior(Prior):
    """Couplings f = f_K ∘ … ∘ f_1 with log p(z|y) = log N(f(z)) + Σ log |det ∂f_k|; before training f only permutes."""

    trained_by_gradient = True

    def __init__(self, config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        if len(latent_shape) > 1 or latent_shape[0] < 2:
            instead = "flow_matching" if len(latent_shape) > 1 else "gmm"
            raise UserError(
                f"prior.name=flow is for latent vectors of 2 dimensions or more, and this model's latents are "
                f"{' x '.join(map(str, latent_shape))}: use prior.name={instead}"
            )
        super().__init__(config, latent_shape, num_classes)
        self.couplings = nn.ModuleList(
            Coupling(latent_shape[0], num_classes, config.width) for _ in range(config.num_layers)
        )

    def sample(self, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.sample: the inverse of the flow."""
        latents, condition = noise.float(), self._condition(labels)
        with torch.autocast(latents.device.type, enabled=False):
            for coupling in reversed(self.couplings):
                latents = coupling.inverse(latents, condition)  # type: ignore[operator]
        return self.restore(latents)

    def to_noise(self, latents: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's latents (B, D) → noise (B, D) and the log-determinant (B,) of this map."""
        noise, condition = self.standardise(latents), self._condition(labels)
        log_det = -self.log_scale().expand(len(noise))
        with torch.autocast(noise.device.type, enabled=False):
            for coupling in self.couplings:
                noise, part = coupling(noise, condition)
                log_det = log_det + part
        return noise, log_det

    def loss(self, latents: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.loss: the negative log-density in nats."""
        noise, log_det = self.to_noise(latents, labels)
        return -normal_log_density(noise) - log_det

    def _condition(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else F.one_hot(labels, self.num_classes).float()


class Coupling(nn.Module):
    """Shuffles the dimensions, then moves the second half by what a network makes of the first: b ← b · exp(s) + t.

    The paper alternates two masks; a fixed random order, drawn with the weights, mixes more.
    """

    order: Tensor
    back: Tensor

    def __init__(self, size: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.kept = size // 2
        order = torch.randperm(size)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.network = nn.Sequential(
            nn.Linear(self.kept + num_classes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * (size - self.kept)),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, D) → (B, D) and its log-determinant (B,)."""
        first, second = latents[:, self.order].tensor_split([self.kept], 1)
        log_scale, shift = self._of(first, condition)
        return torch.cat([first, second * log_scale.exp() + shift], 1), log_scale.sum(1)

    def inverse(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """(B, D) → (B, D), what `forward` made it from."""
        first, second = latents.tensor_split([self.kept], 1)
        log_scale, shift = self._of(first, condition)
        return torch.cat([first, (second - shift) * (-log_scale).exp()], 1)[:, self.back]

    def _of(self, first: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(first if condition is None else torch.cat([first, condition], 1)).chunk(2, 1)
        return MOST_LOG_SCALE * torch.tanh(raw / MOST_LOG_SCALE), shift
