"""Pictures of a run: grids of images as PNG, and the loss curves."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cxr_vae.data.images import PNG_STRATEGY
from cxr_vae.files import write_atomically


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def save_png(path: Path, image: Tensor) -> None:
    """A grey image (H, W) uint8 as a PNG file, which is either whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(image.cpu().numpy()).save(temporary, "PNG", compress_type=PNG_STRATEGY)
    temporary.replace(path)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Images (B, 1, H, W) uint8 side by side, `columns` a row."""
    from torchvision.utils import make_grid  # torchvision takes a second to import

    save_png(path, make_grid(images.cpu(), nrow=columns, padding=2, pad_value=255)[0])


def save_reconstructions(path: Path, originals: Tensor, reconstructions: Tensor, columns: int) -> None:
    """Rows of originals, each above the row of its reconstructions; both (B, 1, H, W) uint8, B at most columns²."""
    rows = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    save_grid(path, torch.cat([row for pair in rows for row in pair]), columns)


def save_loss_curves(path: Path, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Total, reconstruction and KL over epochs, train and test, in nats an image."""
    from matplotlib.figure import Figure  # matplotlib takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    numbers = [record["epoch"] for record in epochs]
    titles = {"loss_nats": "loss", "reconstruction_nats": "reconstruction", "kl_nats": "KL"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for split, style in (("train", "-"), ("test", "--")):
            values = [record[split][name] for record in epochs]
            axes.plot(numbers, values, style, marker="." if len(numbers) < 30 else None, label=split)
        axes.set(title=title, xlabel="epoch", ylabel="nats an image", xlim=(0.5, max(numbers) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomically(path, buffer.getvalue())
