"""What lies between images, and along the axes of the latent space: pictures of decoded latents."""

from pathlib import Path

import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.data.dataset import to_float
from cxr_vae.evaluation.image_sets import ImageSet
from cxr_vae.losses.elbo import kl_per_unit
from cxr_vae.models import VAE
from cxr_vae.noise import BLOCK
from cxr_vae.pictures import save_grid, to_uint8

NUM_PAIRS = 6
NUM_UNITS = 8
STEPS = 9
REACH = 3.0
"""Standard deviations of the prior to which a unit is moved, either way."""


@torch.inference_mode()
def save_latent_pictures(folder: Path, model: VAE, real: ImageSet, config: Config, device: torch.device) -> None:
    """`interpolations.png`, a row a pair of real images; `traversals.png`, a row a latent unit, the most used first.

    Interpolations are straight lines between posterior means. Traversals start from the first image's posterior mean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mean, logvar = model.encode(to_float(real.fetch(0, min(real.num, BLOCK))[0], device))
    pairs = len(mean) // 2
    chosen = torch.linspace(0, pairs - 1, min(NUM_PAIRS, pairs)).long().to(device)
    lines = [torch.lerp(mean[one], mean[-1 - one], share) for one in chosen for share in torch.linspace(0, 1, STEPS)]
    save_grid(folder / "interpolations.png", decoded(model, torch.stack(lines)), STEPS)

    most_used = kl_per_unit(mean, logvar).flatten(1).mean(0).argsort(descending=True)[:NUM_UNITS]
    moved = mean[:1].repeat(len(most_used) * STEPS, *[1] * (mean.dim() - 1))
    flat = moved.flatten(1)
    for row, unit in enumerate(most_used.tolist()):
        flat[row * STEPS : (row + 1) * STEPS, unit] = torch.linspace(-REACH, REACH, STEPS, device=device)
    save_grid(folder / "traversals.png", decoded(model, flat.view_as(moved)), STEPS)


def decoded(model: VAE, latents: Tensor) -> Tensor:
    """Images (B, 1, H, W) uint8 of latents."""
    # Where the decoder is told a class: the first, all along.
    labels = latents.new_zeros(len(latents), dtype=torch.int64) if model.num_classes else None
    parts = [slice(start, start + BLOCK) for start in range(0, len(latents), BLOCK)]
    return torch.cat(
        [to_uint8(model.image(latents[part], None if labels is None else labels[part])).cpu() for part in parts]
    )
