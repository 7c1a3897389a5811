"""Images for the tests of memorisation."""

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_images(num: int, seed: int, *, size: int = 32, noise: float = 3.0) -> Tensor:
    """(num, 1, size, size) uint8: smooth random fields around a common picture, as chests are."""
    source = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(99)) * 40
    fields = torch.randn(num, 1, 7, 7, generator=source) * 22
    images = sum(F.interpolate(part, size=size, mode="bicubic", align_corners=True) for part in (common, fields))
    return (images + torch.randn(num, 1, size, size, generator=source) * noise + 120).clamp(0, 255).to(torch.uint8)


def shifted(images: Tensor, right: int, down: int) -> Tensor:
    """Moved, with the border repeated."""
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8)
    size = images.shape[-1]
    return padded[..., 4 - down : 4 - down + size, 4 - right : 4 - right + size]
