"""`flow_matching`: a velocity field that carries noise to spatial latents along straight lines.

Conditional flow matching with the straight path (Lipman et al. 2023, section 4.1; Liu et al. 2023, rectified flow),
times drawn logit-normal (Esser et al. 2024, section 3.1), classifier-free guidance (Ho and Salimans 2022), autoguidance
(Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024).
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

    It is trained on x_t = (1 - t) ε + t z to give z - ε. Class number `num_classes` means "not told". A guide is a
    small network with the same task, trained on the same draws: where they differ, the field is led on, away from it.
    """

    trained_by_gradient = True

    def __init__(self, config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        if len(latent_shape) != 3:
            raise UserError(
                "prior.name=flow_matching is for spatial latents, and this model's are vectors: "
                "use prior.name=gmm or flow"
            )
        _refuse_what_does_not_fit(config, latent_shape, num_classes)
        super().__init__(config, latent_shape, num_classes)
        self.times, self.label_dropout = config.times, config.label_dropout if num_classes else 0.0
        self.autoguidance = config.autoguidance
        self.network = UNet(latent_shape, num_classes + 1, config.channels, config.num_blocks)
        self.guide = UNet(latent_shape, num_classes + 1, config.guide_channels, 1) if config.guide_channels else None

    def loss(self, latents: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.loss: the squared error of the velocity, mean over the latent's dimensions.

        The guide's error has its gradient in it, and no part in its value.
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
        here, velocity = (1 - at) * noise + at * target, target - noise

        def error(network: UNet) -> Tensor:
            of_latent: Tensor = (network(here, times, classes).float() - velocity).square().flatten(1).mean(1)
            return of_latent

        loss = error(self.network)
        if self.guide is not None:
            of_guide = error(self.guide)
            loss = loss + (of_guide - of_guide.detach())
        return loss

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

        v₀ is the velocity where the class is not told; the two are one call of the network. With autoguidance a, what
        comes out is led on from the guide's u, too: u + a (v - u).
        """
        times = torch.full((len(latents),), time, device=latents.device)
        if self.guidance == 1:
            velocity: Tensor = self.network(latents, times, classes).float()
        else:
            both = torch.cat([classes, torch.full_like(classes, self.num_classes)])
            told, not_told = self.network(latents.repeat(2, 1, 1, 1), times.repeat(2), both).float().chunk(2)
            velocity = torch.lerp(not_told, told, self.guidance)
        if self.autoguidance == 1 or self.guide is None:
            return velocity
        return torch.lerp(self.guide(latents, times, classes).float(), velocity, self.autoguidance)

    def _classes(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor:
        return torch.full((count,), self.num_classes, device=device) if labels is None else labels

    def _times(self, uniform: Tensor) -> Tensor:
        if self.times == "uniform":
            return uniform
        return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * uniform - 1))


def _refuse_what_does_not_fit(config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
    """UserError for networks that these latents are too small for, and guidance by what was not trained."""
    for name in ("channels", "guide_channels"):
        count = len(getattr(config, name))
        multiple = 2 ** max(0, count - 1)
        if any(side % multiple for side in latent_shape[1:]):
            raise UserError(
                f"prior.{name} has {count} resolutions, which takes latents of a side divisible by "
                f"{multiple}, and this model's are {' x '.join(map(str, latent_shape[1:]))}: give it fewer"
            )
    if config.guidance != 1 and not (num_classes and config.label_dropout):
        raise UserError(
            f"prior.guidance={config.guidance:g} needs a prior that was fitted with prior.class_conditional and "
            "prior.label_dropout above 0, and this one wasn't: fit it again, or set prior.guidance=1"
        )
    if config.autoguidance != 1 and not config.guide_channels:
        raise UserError(
            f"prior.autoguidance={config.autoguidance:g} needs a prior that was fitted with prior.guide_channels, and "
            "this one wasn't: fit it again, as with prior.guide_channels=[16,32], or set prior.autoguidance=1"
        )
