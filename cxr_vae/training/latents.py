"""The posteriors of a whole split under trained weights: what priors are fitted to."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cxr_vae.console import Progress
from cxr_vae.data.dataset import Rows, XrayDataset, read_in_order, to_float
from cxr_vae.data.index import SplitIndex
from cxr_vae.distributed import World
from cxr_vae.losses.elbo import LOGVAR_RANGE
from cxr_vae.models import VAE
from cxr_vae.noise import BLOCK


@torch.inference_mode()
def encode_split(model: VAE, dataset: XrayDataset, here: World) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance (N, *latent_shape) float32 and class (N,) int64 of each image, on the CPU of every rank.

    In float32 and in evaluation mode, each image once, in stored order and in blocks of 64 whatever the number of
    ranks. They are held in memory: 25 kB an image at 4 x 28 x 28.
    """
    model.eval()
    num = len(dataset)
    first, last = (block * BLOCK for block in here.slice(0, -(-num // BLOCK)))
    empty = torch.empty(0, *model.latent_shape)
    means, logvars = [empty], [empty]
    with (
        Progress(num, "encode", enabled=here.is_main) as progress,
        read_in_order(dataset, first, min(last, num), BLOCK) as batches,
    ):
        for _, images in batches:
            mean, logvar = model.encode(to_float(images, here.device))
            means.append(mean.float().cpu())
            logvars.append(logvar.float().clamp(*LOGVAR_RANGE).cpu())
            progress.advance(len(images) * here.size)
    parts = here.all_gather((torch.cat(means).numpy(), torch.cat(logvars).numpy()))
    mean, logvar = (torch.from_numpy(np.concatenate(kind)) for kind in zip(*parts, strict=True))
    assert len(mean) == num, "an image was missed or encoded twice"
    return mean, logvar, dataset.labels(range(num), torch.device("cpu"))


class LatentSet:
    """The posteriors of a split in place of its images: means and log-variances (n, 2, *latent_shape), on a device."""

    workers = 1

    def __init__(self, index: SplitIndex, mean: Tensor, logvar: Tensor, labels: Tensor, device: torch.device) -> None:
        self.index, self.device = index, device
        self.posteriors, self.labels = torch.stack([mean, logvar], 1).to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.posteriors)

    @property
    def place(self) -> Literal["gpu", "memory", "shards"]:
        """See ImageSource."""
        return "memory" if self.device.type == "cpu" else "gpu"

    def images(self, rows: Sequence[int] | Rows) -> Tensor:
        """See ImageSource: (n, 2, *latent_shape)."""
        return self.posteriors.index_select(0, self._on_device(rows))

    def labels_of(self, rows: Sequence[int] | Rows) -> Tensor:
        """(n,) int64 classes of these rows."""
        return self.labels.index_select(0, self._on_device(rows))

    def holds(self, rows: Rows) -> bool:
        """See ImageSource."""
        return True

    def _on_device(self, rows: Sequence[int] | Rows) -> Tensor:
        return torch.from_numpy(np.asarray(rows, np.int64)).to(self.device, non_blocking=True)
