"""`flow_matching`: a velocity field that carries noise to spatial latents along straight lines.

Conditional flow matching with the straight path (Lipman et al. 2023, section 4.1; Liu et al. 2023, rectified flow),
times drawn logit-normal (Esser et al. 2024, section 3.1), classifier-free guidance (Ho and Salimans 2022).
"""

import math

import torch
from torch import Tensor

from cxr_vae.config import PriorConfig
from cxr_vae.errors import UserError
from cxr_vae.priors.base import Prior
from cxr_vae.priors.unet import UNet


class FlowMatchingPrior(Prior):
    """Latents are where the field takes noise between t = 0 and t = 1: dx = v(x, t, y) dt.

    It is trained on x_t = (1 - t) ε + t z to give z - ε. Class number `num_classes` means "not told".
    """

    trained_by_gradient = True

    def __init__(self, config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        multiple = 2 ** (len(config.channels) - 1)
        if len(latent_shape) != 3:
            raise UserError(
                "prior.name=flow_matching is for spatial latents, and this model's are vectors: "
                "use prior.name=gmm or flow"
            )
        if any(side % multiple for side in latent_shape[1:]):
            raise UserError(
                f"prior.channels has {len(config.channels)} resolutions, which takes latents of a side divisible by "
                f"{multiple}, and this model's are {' x '.join(map(str, latent_shape[1:]))}: give it fewer"
            )
        super().__init__(config, latent_shape, num_classes)
        self.times, self.label_dropout = config.times, config.label_dropout if num_classes else 0.0
        self.network = UNet(latent_shape, num_classes + 1, config.channels, config.num_blocks)

    def loss(self, latents: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.loss: the squared error of the velocity, mean over the latent's dimensions.

        `uniform` decides both the time and whether the class is told: what is left of it below (above) the share of
        dropped labels is again uniform, and independent of that choice.
        """
        share = self.label_dropout
        dropped = uniform < share
        rest = torch.where(dropped, uniform / max(share, 1e-9), (uniform - share) / (1 - share))
        times = self._times(rest.clamp(1e-6, 1 - 1e-6))
        classes = self._classes(labels, len(latents), latents.device)
        classes = torch.where(dropped, torch.full_like(classes, self.num_classes), classes)
        at = times.view(-1, 1, 1, 1)
        target = self.standardise(latents)
        velocity = self.network((1 - at) * noise + at * target, times, classes)
        error: Tensor = (velocity.float() - (target - noise)).square().flatten(1).mean(1)
        return error

    def sample(self, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.sample: `num_steps` equal steps of Heun's method, of second order."""
        latents, step = noise.float(), 1 / self.num_steps
        classes = self._classes(labels, len(noise), noise.device)
        for number in range(self.num_steps):
            here = self.velocity(latents, number * step, classes)
            there = self.velocity(latents + step * here, (number + 1) * step, classes)
            latents = latents + (0.5 * step) * (here + there)
        return self.restore(latents)

    def velocity(self, latents: Tensor, time: float, classes: Tensor) -> Tensor:
        """The field at standardised latents (n, C, H, W), (n, C, H, W) float32, with guidance g: v₀ + g (v - v₀).

        v₀ is the velocity where the class is not told. The two are one call of the network.
        """
        times = torch.full((len(latents),), time, device=latents.device)
        if self.guidance == 1 or not self.num_classes:
            told: Tensor = self.network(latents, times, classes)
            return told.float()
        both = torch.cat([classes, torch.full_like(classes, self.num_classes)])
        told, not_told = self.network(latents.repeat(2, 1, 1, 1), times.repeat(2), both).float().chunk(2)
        return torch.lerp(not_told, told, self.guidance)

    def _classes(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        return torch.full((count,), self.num_classes, device=device) if labels is None else labels

    def _times(self, uniform: Tensor) -> Tensor:
        if self.times == "uniform":
            return uniform
        return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * uniform - 1))
