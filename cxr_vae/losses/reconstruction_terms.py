"""Reconstruction terms beside the likelihood: distances between a mean image and the image itself.

They are added to what is minimised and never to an ELBO; equal images are at distance 0. Each is (B, 1, H, W) in [0, 1]
twice → (B,), on the scale of nats summed over pixels: a mean over the image times its number of pixels, so that a
weight means the same at any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
"""Of the Laplacian pyramid at most: 224 → 14 pixels a side and what is left."""

SCALE_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM's scales, the finest first: Wang et al., 2003, section 3.2. With fewer scales made to sum to 1 again."""

WINDOW = 11
"""Pixels a side of SSIM's Gaussian window of deviation 1.5: Wang et al., 2004."""

SMALLEST_SIMILARITY = 1e-4
"""Of a scale: a power below 1 has no gradient at 0, and what structures that are opposite give is below 0."""


def laplacian_distance(images: Tensor, targets: Tensor) -> Tensor:
    """L1 distance of Laplacian pyramids: Σ 2^(2j) |L_j(x) - L_j(y)|, Bojanowski et al., 2018, eq. 3.

    The pyramid is Burt and Adelson's (1983). It is linear, so one of the difference will do; beyond the border the
    images don't differ. Each level's mean over its pixels counts the same, the coarsest image that is left too.
    """
    rest = images.float() - targets.float()
    num_pixels = rest[0].numel()
    total = torch.zeros(len(rest), device=rest.device)
    for _ in range(LEVELS):
        if min(rest.shape[2:]) < 2:
            break
        coarser = _blur(rest)[:, :, ::2, ::2]
        total = total + (rest - _expand(coarser, rest)).abs().flatten(1).mean(1)
        rest = coarser
    return (total + rest.abs().flatten(1).mean(1)) * num_pixels


def ms_ssim_distance(images: Tensor, targets: Tensor) -> Tensor:
    """(1 - MS-SSIM) times the number of pixels: Wang et al., 2003, eq. 7, with as many of its five scales as fit.

    From one scale to the next means of 2 × 2 pixels. Written out, since torchmetrics' makes a GPU wait.
    """
    images, targets = images.float(), targets.float()
    num_pixels, scales = images[0].numel(), num_scales(min(images.shape[2:]))
    exponents = [exponent / sum(SCALE_EXPONENTS[:scales]) for exponent in SCALE_EXPONENTS[:scales]]
    similarity = torch.ones(len(images), device=images.device)
    for number, exponent in enumerate(exponents):
        luminance, contrast_structure = _ssim_parts(images, targets)
        parts = luminance * contrast_structure if number == scales - 1 else contrast_structure
        similarity = similarity * parts.flatten(1).mean(1).clamp(min=SMALLEST_SIMILARITY).pow(exponent)
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
    return (1 - similarity) * num_pixels


def num_scales(side: int) -> int:
    """How many of MS-SSIM's scales fit into images of this side: the window has to fit into the coarsest."""
    return max(1, sum(side >> scale >= WINDOW for scale in range(len(SCALE_EXPONENTS))))


def _ssim_parts(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of each window (B, 1, H - 10, W - 10): Wang et al., 2004, eq. 6, 10."""
    stacked = torch.cat([images, targets, images.square(), targets.square(), images * targets], dim=1)
    at = torch.arange(WINDOW, device=images.device, dtype=torch.float32) - WINDOW // 2
    kernel = torch.softmax(-at.square() / (2 * 1.5**2), dim=0)
    means = _separable(stacked, kernel, padding=0)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.split(1, dim=1)
    variance_x, variance_y = mean_xx - mean_x.square(), mean_yy - mean_y.square()
    covariance = mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * covariance + c2) / (variance_x + variance_y + c2)


def _binomial(device: torch.device) -> Tensor:
    """(1, 4, 6, 4, 1) / 16, made on the device."""
    box = torch.full((1, 1, 2), 0.5, device=device)
    kernel = box
    for _ in range(3):
        kernel = F.conv1d(kernel, box, padding=1)
    return kernel.flatten()


def _blur(images: Tensor) -> Tensor:
    return _separable(images, _binomial(images.device), padding=2)


def _expand(coarser: Tensor, like: Tensor) -> Tensor:
    """Twice the size, that of `like`: zeros between the pixels, then four times the blur."""
    spread = torch.zeros_like(like)
    spread[:, :, ::2, ::2] = coarser
    return 4 * _blur(spread)


def _separable(images: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """Each channel of (B, C, H, W) convolved with the kernel along both sides; zeros beyond the border."""
    planes = images.flatten(0, 1)[:, None]
    planes = F.conv2d(planes, kernel.view(1, 1, -1, 1), padding=(padding, 0))
    planes = F.conv2d(planes, kernel.view(1, 1, 1, -1), padding=(0, padding))
    return planes.view(*images.shape[:2], *planes.shape[2:])


RECONSTRUCTION_TERMS = {"laplacian_weight": laplacian_distance, "ms_ssim_weight": ms_ssim_distance}
"""By the option that weighs it."""
