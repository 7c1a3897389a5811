"""How a model does on the test split: its losses, and pictures of samples and reconstructions."""

from collections.abc import Callable

import torch

from cxr_vae.config import Config
from cxr_vae.data.dataset import XrayDataset, read_in_order, to_float
from cxr_vae.distributed import World
from cxr_vae.losses.elbo import Losses, negative_elbo
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
    with read_in_order(dataset, first, last, BATCH) as batches:
        for rows, pixels in batches:
            images = to_float(pixels, here.device)
            noise = normal(config.seed, "test", rows.start, rows.stop, model.latent_shape, here.device)
            with autocast(config.train.precision, here.device):
                labels = dataset.labels(rows, here.device) if model.num_classes else None
                output = model(images, noise, labels)
            losses = negative_elbo(output, images, config.objective.likelihood)
            sums += torch.stack([*(term.double().sum() for term in losses), sums.new_tensor(len(rows))])
    reconstruction, kl, count = here.sum_(sums).cpu()
    assert int(count) == len(dataset), "a test image was missed or counted twice"
    return Losses(reconstruction / count, kl / count)


@torch.inference_mode()
def draw_grids(
    run: RunDir, epoch: int, model: VAE, dataset: XrayDataset, config: Config, device: torch.device
) -> Callable[[], None]:
    """samples/ and reconstructions/ after `epoch` epochs: the same latents and the same test images each time.

    What is returned writes them: to be called later or by a thread, since that takes longer than an epoch on a GPU.
    """
    model.eval()
    side = config.train.grid_size
    latents = normal(config.seed, "grid", 0, side * side, model.latent_shape, device)
    columns = min(side, len(dataset))
    rows = range(columns * min(max(1, side // 2), len(dataset) // columns))  # whole ones of the picture
    images = dataset.images(rows)
    in_turn = torch.arange(side * side, device=device) % model.num_classes if model.num_classes else None
    labels = dataset.labels(rows, device) if model.num_classes else None
    with autocast(config.train.precision, device):
        samples = model.image(latents, in_turn)
        mean, _ = model.encode(to_float(images, device))
        reconstructions = model.image(mean.float(), labels)
    samples, reconstructions, images = to_uint8(samples).cpu(), to_uint8(reconstructions).cpu(), images.cpu()

    def write() -> None:
        save_grid(run.grid("samples", epoch), samples, side)
        save_reconstructions(run.grid("reconstructions", epoch), images, reconstructions, columns)

    return write
