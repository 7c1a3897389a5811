"""Losses of the patch discriminator and of the decoder that is to deceive it, and how much the latter counts.

All of them are functions of one image alone, float32, so it doesn't matter how a batch is divided among ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_NORM = 1e-6
"""Added to the adversarial gradient's norm; of means over patches it is some 1e-3 at the pixels."""

LARGEST_WEIGHT = 1e8
"""Of the adversarial loss. Reconstructions are summed over pixels and patches averaged, so 1e5 is nothing unusual; the
bound is for a discriminator without any gradient."""


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Means over patches of max(0, 1 - real) / 2 + max(0, 1 + fake) / 2: logits (B, 1, h, w) twice → (B,).

    Lim and Ye, "Geometric GAN", 2017, eq. 5 with 6, halved as in VQGAN (Esser et al., 2021).
    """
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return 0.5 * (real.flatten(1).mean(1) + fake.flatten(1).mean(1))


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-fake, the mean over patches: logits (B, 1, h, w) → (B,). Their eq. 7."""
    return -fake_logits.float().flatten(1).mean(1)


def feature_matching_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Mean absolute differences of the discriminator's features, summed over its layers: (B, C, h, w) each → (B,).

    Wang et al., "High-Resolution Image Synthesis with Conditional GANs" (pix2pixHD), 2018, eq. 4. That a VAE should
    compare images in the features of its discriminator is Larsen et al.'s "Autoencoding beyond pixels", 2016.
    """
    distances = [(a.float() - b.float()).abs().flatten(1).mean(1) for a, b in zip(real, fake, strict=True)]
    return torch.stack(distances).sum(0)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """‖∇ reconstruction‖ / ‖∇ adversarial‖ of gradients at the decoder's logits, (B, 1, H, W) each → (B,), detached.

    VQGAN, eq. 7: weighted so, both losses pull equally hard. There the gradients are those of the decoder's last layer,
    of a whole batch on one GPU; here they are each image's own at what the decoder gives, so the weight depends neither
    on the other images nor on how a batch is divided among ranks and micro-batches, and costs no pass through a layer.
    """
    reconstruction, adversarial = (
        gradient.detach().float().flatten(1).norm(dim=1) for gradient in (reconstruction_gradient, adversarial_gradient)
    )
    weight: Tensor = reconstruction / (adversarial + SMALLEST_NORM)
    return weight.clamp(max=LARGEST_WEIGHT)
