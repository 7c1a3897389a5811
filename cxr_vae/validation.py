"""How a model does on the test split: its losses, and pictures of samples and reconstructions."""

import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.dataset import XrayDataset
from cxr_vae.distributed import World
from cxr_vae.losses import Losses, negative_elbo
from cxr_vae.models import VAE
from cxr_vae.noise import normal
from cxr_vae.pictures import save_grid, save_reconstructions, to_uint8
from cxr_vae.precision import autocast
from cxr_vae.run_dir import RunDir

BATCH = 64


@torch.inference_mode()
def test_losses(model: VAE, dataset: XrayDataset, config: Config, here: World) -> Losses:
    """Mean terms of the negative ELBO over the whole split, () float64 each; every image once, over all ranks.

    One latent is drawn an image, with noise that depends on (seed, image) alone.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=here.device)
    first, last = here.slice(0, len(dataset))
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        images = to_float(dataset.images(range(start, stop)), here.device)
        noise = normal(config.seed, "test", start, stop, model.latent_shape, here.device)
        with autocast(config.train.precision, here.device):
            output = model(images, noise)
        losses = negative_elbo(output.logits, images, output.mean, output.logvar)
        sums += torch.stack([*(term.double().sum() for term in losses), sums.new_tensor(stop - start)])
    reconstruction, kl, count = here.sum_(sums).cpu()
    assert int(count) == len(dataset), "a test image was missed or counted twice"
    return Losses(reconstruction / count, kl / count)


@torch.inference_mode()
def save_grids(run: RunDir, epoch: int, model: VAE, dataset: XrayDataset, config: Config, device: torch.device) -> None:
    """samples/ and reconstructions/ after `epoch` epochs: the same latents and the same test images each time."""
    model.eval()
    side = config.train.grid_size
    latents = normal(config.seed, "grid", 0, side * side, model.latent_shape, device)
    columns = min(side, len(dataset))
    images = dataset.images(range(columns * min(max(1, side // 2), len(dataset) // columns)))  # whole rows
    with autocast(config.train.precision, device):
        samples = model.decode(latents)
        mean, _ = model.encode(to_float(images, device))
        reconstructions = model.decode(mean.float())
    save_grid(run.grid("samples", epoch), to_uint8(samples.float().sigmoid()), side)
    save_reconstructions(
        run.grid("reconstructions", epoch), images, to_uint8(reconstructions.float().sigmoid()).cpu(), columns
    )


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in [0, 1] on `device`; the bytes travel, not the floats."""
    return images.to(device, non_blocking=True).float() / 255
