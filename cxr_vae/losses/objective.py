"""What is minimised: the negative ELBO with a weight on its KL, free bits, and terms beside it."""

import torch
from torch import Tensor

from cxr_vae.config import ObjectiveConfig
from cxr_vae.losses.elbo import Losses, Output, kl_with_free_bits, negative_elbo
from cxr_vae.losses.likelihoods import LIKELIHOODS
from cxr_vae.losses.reconstruction_terms import RECONSTRUCTION_TERMS


def objective(
    output: Output, images: Tensor, config: ObjectiveConfig, kl_weight: Tensor | float
) -> tuple[Losses, Tensor]:
    """The terms of the negative ELBO, which are reported, and the loss that is minimised, (B,) float32 each.

    Without free bits and further terms the loss is the terms' weighted sum. It depends on each image alone.
    """
    losses = negative_elbo(output, images, config.likelihood)
    with torch.autocast(images.device.type, enabled=False):
        kl = kl_with_free_bits(output.mean, output.logvar, config.free_bits) if config.free_bits else losses.kl
        loss = losses._replace(kl=kl).total(kl_weight)
        weights = {name: getattr(config, name) for name in RECONSTRUCTION_TERMS if getattr(config, name)}
        if weights:
            mean_images = LIKELIHOODS[config.likelihood].image(output.logits)
            for name, weight in weights.items():
                loss = loss + weight * RECONSTRUCTION_TERMS[name](mean_images, images)
        return losses, loss
