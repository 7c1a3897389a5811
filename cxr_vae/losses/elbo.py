"""The negative evidence lower bound, in nats an image (Kingma and Welling, 2014, eq. 3).

Everything here is computed in float32 whatever the network ran in, from logits, and returned an image, so that the
caller can take the mean over the global batch and not over its part of it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cxr_vae.losses.likelihoods import LIKELIHOODS

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this: exp stays finite in float32, and no useful posterior lies outside."""


class Output(NamedTuple):
    """A forward pass of a VAE, which is all that the objective depends on beside the images."""

    logits: Tensor
    """(B, 1, H, W), the decoder's."""
    mean: Tensor
    """(B, *latent), the posterior's."""
    logvar: Tensor
    """(B, *latent), the posterior's log-variance."""
    log_scale: Tensor
    """() float32, the pixels'; 0 where the likelihood has none."""


class Losses(NamedTuple):
    """Terms of the negative ELBO; each (B,) float32 in nats an image, or their sums or means over images."""

    reconstruction: Tensor
    kl: Tensor

    def total(self, kl_weight: Tensor | float = 1.0) -> Tensor:
        """The weighted sum; with `kl_weight` 1 the negative ELBO."""
        return self.reconstruction + kl_weight * self.kl


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)), summed over latent dimensions: (B, *latent) → (B,) nats."""
    return kl_per_unit(mean, logvar).flatten(1).sum(1)


def kl_per_unit(mean: Tensor, logvar: Tensor) -> Tensor:
    """The same of each latent dimension, of the same shape; Kingma and Welling, 2014, appendix B."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def kl_with_free_bits(mean: Tensor, logvar: Tensor, free_bits: float) -> Tensor:
    """The KL with at least `free_bits` nats counted for each latent unit: (B, *latent) → (B,) nats.

    Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, eq. 15: what a unit says
    up to there costs nothing. The units of a channel of spatial latents share what is free: their mean counts. Unlike
    there the maximum is taken for each image alone and not for the mean over a batch, so that an image's loss depends
    neither on its neighbours nor on how a batch is divided among ranks.
    """
    per_unit = kl_per_unit(mean, logvar).unsqueeze(-1).flatten(2)  # (B, D, 1) or (B, C, positions)
    return per_unit.mean(2).clamp(min=free_bits).sum(1) * per_unit.shape[2]


def negative_elbo(output: Output, images: Tensor, likelihood: str) -> Losses:
    """The terms of the negative ELBO of each image, outside autocast in float32."""
    with torch.autocast(images.device.type, enabled=False):
        reconstruction = LIKELIHOODS[likelihood].nll(output.logits, images, output.log_scale)
        return Losses(reconstruction, kl_to_standard_normal(output.mean, output.logvar))


def bits_per_dim(nats: float, image_size: int) -> float:
    """Nats an image as bits a pixel."""
    return nats / (image_size * image_size * math.log(2))
