"""What a model makes of real images: bounds on their likelihood, and how close their reconstructions are."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cxr_vae.evaluation.metrics import Figure, mean_figure
from cxr_vae.losses.elbo import LOGVAR_RANGE, kl_per_unit
from cxr_vae.models import VAE
from cxr_vae.noise import normal
from cxr_vae.pictures import to_uint8

ACTIVE_VARIANCE = 0.01
"""Of the posterior mean over images, above which a latent unit counts as active: Burda et al. 2016, section 5.2."""

CHUNK = 16
"""Latents decoded at once: their activations stay in a CPU's caches."""


@torch.inference_mode()
def measure(
    model: VAE, images: Tensor, labels: Tensor | None, start: int, seed: int, num_samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (n, 1, H, W) in [0, 1] → their reconstructions from the posterior mean, uint8, and tensors an image.

    `labels` (n,) are their classes, where the decoder is told.
    `negative_elbo_nats`, `reconstruction_nats` (one latent each), `importance_bound_nats` (`num_samples` latents each),
    `psnr_db`, `ssim`, all (n,) float64; `mean` and `kl_per_unit` (n, D). `start` is the position of the first: the
    noise is a function of (seed, position). In float32, since differences of thousands of nats are taken.
    """
    device = images.device
    mean, logvar = (latent.float() for latent in model.encode(images))
    logvar = logvar.clamp(*LOGVAR_RANGE)
    reconstructions = to_uint8(model.image(mean, labels))
    noise = normal(seed, "test", start, start + len(images), model.latent_shape, device)
    nats = model.nll(mean + torch.exp(0.5 * logvar) * noise, images, labels).double()
    per_unit = kl_per_unit(mean, logvar).flatten(1)
    found = {
        "negative_elbo_nats": nats + per_unit.sum(1).double(),
        "reconstruction_nats": nats,
        "mean": mean.flatten(1),
        "kl_per_unit": per_unit,
        "importance_bound_nats": importance_bound(model, images, labels, mean, logvar, start, seed, num_samples),
        **likeness(images, reconstructions.float() / 255),
    }
    return reconstructions.cpu(), {name: tensor.cpu() for name, tensor in found.items()}


def importance_bound(
    model: VAE,
    images: Tensor,
    labels: Tensor | None,
    mean: Tensor,
    logvar: Tensor,
    start: int,
    seed: int,
    num_samples: int,
) -> Tensor:
    """-log of the mean of p(x|z) p(z) / q(z|x) over K latents of the posterior, (n,) float64 nats.

    Burda et al. 2016, eq. 8: an upper bound of the negative log-likelihood, tighter with K; with K = 1 the ELBO.
    """
    deviation = torch.exp(0.5 * logvar)
    bounds = []
    for number, image in enumerate(images):
        position = (start + number) * num_samples
        noise = normal(seed, "importance", position, position + num_samples, model.latent_shape, images.device)
        weights = []
        for part in noise.split(CHUNK):
            latents = mean[number] + deviation[number] * part
            of_image = None if labels is None else labels[number].expand(len(part))
            log_likelihood = -model.nll(latents, image.expand(len(part), -1, -1, -1), of_image).double()
            # Of two normal densities the constants cancel.
            log_prior = -0.5 * latents.double().square().flatten(1).sum(1)
            log_posterior = -0.5 * (part.double().square().flatten(1).sum(1) + logvar[number].double().sum())
            weights.append(log_likelihood + log_prior - log_posterior)
        bounds.append(math.log(num_samples) - torch.cat(weights).logsumexp(0))
    return torch.stack(bounds)


def likeness(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of pairs (n, 1, H, W) in [0, 1], each (n,).

    SSIM: Wang et al. 2004 with their window of 11 pixels, from torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    error = (images - reconstructions).double().square().flatten(1).mean(1)
    similar = ssim(reconstructions, images, data_range=1.0, reduction="none")
    return {"psnr_db": -10 * error.clamp(min=1e-12).log10(), "ssim": torch.as_tensor(similar).flatten().double()}


def likelihood_figures(found: Mapping[str, Tensor], image_size: int) -> dict[str, Figure]:
    """Means over images, nats an image; bits per dimension are those of the importance-weighted bound."""
    values = {name: tensor.numpy() for name, tensor in found.items()}
    figures = {
        name: mean_figure(values[name])
        for name in ("importance_bound_nats", "negative_elbo_nats", "reconstruction_nats")
    }
    figures["kl_nats"] = mean_figure(values["kl_per_unit"].astype(np.float64).sum(1))
    per_dim = 1 / (image_size * image_size * math.log(2))
    bound = figures["importance_bound_nats"]
    figures["bits_per_dim"] = Figure(bound.value * per_dim, bound.standard_error * per_dim)
    return figures


def unit_facts(found: Mapping[str, Tensor]) -> dict[str, object]:
    """How many latent units are active (Burda et al. 2016), and the KL of each, largest first, in nats an image."""
    variances = found["mean"].double().var(0)
    per_unit = found["kl_per_unit"].double().mean(0).sort(descending=True)[0]
    return {
        "active_units": int((variances > ACTIVE_VARIANCE).sum()),
        "num_units": len(variances),
        "kl_nats_per_unit": [round(nats, 5) for nats in per_unit.tolist()],
    }
