"""What lies between images, and along the axes of the latent space: pictures of decoded latents."""

from pathlib import Path

import torch
from torch import Tensor

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
def save_latent_pictures(folder: Path, model: VAE, images: Tensor, labels: Tensor | None) -> None:
    """`interpolations.png`, a row a pair of real images; `traversals.png`, a row a latent unit, the most used first.

    From images (n, 1, H, W) float32 and, where the decoder is told of classes, theirs (n,). Interpolations are straight
    lines between posterior means, told the class of the nearer end. Traversals start from the first image's posterior
    mean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mean, logvar = model.encode(images)
    pairs = len(mean) // 2
    shares = torch.linspace(0, 1, STEPS)
    ones = torch.linspace(0, pairs - 1, min(NUM_PAIRS, pairs)).long().tolist()
    lines = [torch.lerp(mean[one], mean[-1 - one], share) for one in ones for share in shares.tolist()]
    nearer = [one if share < 0.5 else -1 - one for one in ones for share in shares.tolist()]
    told = None if labels is None else labels[nearer]
    save_grid(folder / "interpolations.png", decoded(model, torch.stack(lines), told), STEPS)

    most_used = kl_per_unit(mean, logvar).flatten(1).mean(0).argsort(descending=True)[:NUM_UNITS]
    moved = mean[:1].repeat(len(most_used) * STEPS, *[1] * (mean.dim() - 1))
    flat = moved.flatten(1)
    for row, unit in enumerate(most_used.tolist()):
        flat[row * STEPS : (row + 1) * STEPS, unit] = torch.linspace(-REACH, REACH, STEPS, device=mean.device)
    told = None if labels is None else labels[:1].expand(len(moved))
    save_grid(folder / "traversals.png", decoded(model, flat.view_as(moved), told), STEPS)


def decoded(model: VAE, latents: Tensor, labels: Tensor | None) -> Tensor:
    """Images (B, 1, H, W) uint8 of latents."""
    parts = [slice(start, start + BLOCK) for start in range(0, len(latents), BLOCK)]
    return torch.cat(
        [to_uint8(model.image(latents[part], None if labels is None else labels[part])).cpu() for part in parts]
    )
