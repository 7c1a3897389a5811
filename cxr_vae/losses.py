"""The objective: the negative evidence lower bound, in nats an image (Kingma and Welling, 2014, eq. 3).

Everything here is computed in float32 whatever the network ran in, from logits, and returned an image, so that the
caller can take the mean over the global batch and not over its part of it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this: exp stays finite in float32, and no useful posterior lies outside."""


class Losses(NamedTuple):
    """Terms of the negative ELBO; each (B,) float32 in nats an image, or their sums or means over images."""

    reconstruction: Tensor
    kl: Tensor

    def total(self, kl_weight: float = 1.0) -> Tensor:
        """The loss that is minimised; with `kl_weight` 1 the negative ELBO."""
        return self.reconstruction + kl_weight * self.kl


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy of images in [0, 1] under Bernoulli pixels, summed over pixels: (B, 1, H, W) → (B,) nats.

    Grey values between 0 and 1 are taken as probabilities, as is the habit; the figure is then no log-likelihood of
    the 8-bit image, and its minimum is the entropy of the grey values, not 0.
    """
    nats = F.binary_cross_entropy_with_logits(logits.float(), images.float(), reduction="none")
    return nats.flatten(1).sum(1)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)), summed over latent dimensions: (B, D) → (B,) nats."""
    return kl_per_unit(mean, logvar).sum(1)


def kl_per_unit(mean: Tensor, logvar: Tensor) -> Tensor:
    """The same of each latent dimension, of the same shape; Kingma and Welling, 2014, appendix B."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def negative_elbo(logits: Tensor, images: Tensor, mean: Tensor, logvar: Tensor) -> Losses:
    """The terms of the negative ELBO of each image, outside autocast in float32."""
    with torch.autocast(images.device.type, enabled=False):
        return Losses(bernoulli_nll(logits, images), kl_to_standard_normal(mean, logvar))


def bits_per_dim(nats: float, image_size: int) -> float:
    """Nats an image as bits a pixel."""
    return nats / (image_size * image_size * math.log(2))
