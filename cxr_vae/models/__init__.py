"""The networks by name.

To add one: write its module, add its class here, its name to `ModelConfig.name` and its options to
`config.model.ARCHITECTURES`.
"""

from collections.abc import Callable

from cxr_vae.config import Config
from cxr_vae.losses.elbo import Output
from cxr_vae.models.base import VAE
from cxr_vae.models.conv import ConvVAE
from cxr_vae.models.discriminator import PatchDiscriminator
from cxr_vae.models.residual import ResidualVAE
from cxr_vae.noise import seeded

MODELS: dict[str, Callable[[Config], VAE]] = {"conv": ConvVAE, "residual": ResidualVAE}

__all__ = ["MODELS", "VAE", "Output", "PatchDiscriminator", "build_discriminator", "build_model"]


def build_model(config: Config) -> VAE:
    """The network the configuration asks for, with its initialisation drawn from its seed."""
    with seeded(config.seed, "weights"):
        return MODELS[config.model.name](config)


def build_discriminator(config: Config) -> PatchDiscriminator:
    """The network of the adversarial loss, its initialisation drawn from the seed, too, and not the model's."""
    with seeded(config.seed, "weights", 1):
        return PatchDiscriminator(config.objective.adversarial_channels)
