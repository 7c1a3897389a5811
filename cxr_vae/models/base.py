"""What every VAE here can do, and nothing about how."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cxr_vae.losses import LOGVAR_RANGE


class Output(NamedTuple):
    """A forward pass: the decoder's logits (B, 1, H, W) and the posterior's mean and log-variance (B, *latent)."""

    logits: Tensor
    mean: Tensor
    logvar: Tensor


class VAE(nn.Module, ABC):
    """A Gaussian encoder and a decoder that returns logits of the pixels."""

    latent_shape: tuple[int, ...]
    """Of one image's latent, (D,) for vectors."""

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, H, W) in [0, 1] → the posterior's mean and log-variance, each (B, *latent_shape)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *latent_shape) → logits (B, 1, H, W); their sigmoid is the image."""

    def forward(self, images: Tensor, noise: Tensor) -> Output:
        """Encodes, draws z = μ + σ·ε with the standard normal `noise` as ε (B, *latent_shape), decodes."""
        mean, logvar = self.encode(images)
        # In float32 also under autocast: exp of a bf16 log-variance is off by up to a few per cent.
        mean, logvar = mean.float(), logvar.float().clamp(*LOGVAR_RANGE)
        latents = mean + torch.exp(0.5 * logvar) * noise
        return Output(self.decode(latents), mean, logvar)
