"""The networks by name. To add one: write its module, add its class here and its name to `ModelConfig.name`."""

import torch

from cxr_vae.config import Config
from cxr_vae.models.base import VAE, Output
from cxr_vae.models.conv import ConvVAE
from cxr_vae.noise import seed_of

MODELS = {"conv": ConvVAE}

__all__ = ["MODELS", "VAE", "Output", "build_model"]


def build_model(config: Config) -> VAE:
    """The network the configuration asks for, with PyTorch's default initialisation drawn from its seed."""
    with torch.random.fork_rng(devices=[]):  # leaves the global random state alone
        torch.manual_seed(seed_of(config.seed, "weights"))
        return MODELS[config.model.name](config.model, config.data.image_size)
