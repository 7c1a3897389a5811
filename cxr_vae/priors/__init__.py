"""The priors by name. To add one: write its module, add its class here and its name to `PriorConfig.name`."""

from collections.abc import Sequence

from cxr_vae.config import PriorConfig
from cxr_vae.noise import seeded
from cxr_vae.priors.base import Prior
from cxr_vae.priors.flow import FlowPrior
from cxr_vae.priors.flow_matching import FlowMatchingPrior
from cxr_vae.priors.gmm import MixturePrior
from cxr_vae.priors.standard import StandardPrior

PRIORS: dict[str, type[Prior]] = {
    "standard": StandardPrior,
    "gmm": MixturePrior,
    "flow": FlowPrior,
    "flow_matching": FlowMatchingPrior,
}

__all__ = ["PRIORS", "Prior", "build_prior"]


def build_prior(config: PriorConfig, latent_shape: Sequence[int], num_classes: int, seed: int) -> Prior:
    """The prior the configuration asks for, with networks drawn from `seed`, before it is fitted.

    Raises UserError where it is none for latents of this shape.
    """
    with seeded(seed, "prior_weights"):
        return PRIORS[config.name](config, tuple(latent_shape), num_classes)
