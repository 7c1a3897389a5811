"""Terms beside the likelihood, against torchmetrics, scikit-image and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from cxr_vae.losses.reconstruction_terms import (
    RECONSTRUCTION_TERMS,
    SCALE_EXPONENTS,
    laplacian_distance,
    ms_ssim_distance,
    num_scales,
)


def pair(side: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and noisy ones."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(3, 1, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    return images, (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("side", [40, 64, 224])
def test_ms_ssim_is_made_of_torchmetrics_and_scikit_images_parts(side: int) -> None:
    """Contrast and structure of torchmetrics at each scale; the coarsest scale's SSIM of scikit-image.

    Not torchmetrics' SSIM, whose mean takes in windows that hang over the border.
    """
    images, noisy = pair(side)
    scales = num_scales(side)
    exponents = np.array(SCALE_EXPONENTS[:scales]) / sum(SCALE_EXPONENTS[:scales])
    found = (1 - ms_ssim_distance(noisy, images) / side**2).numpy()
    expected, x, y = np.ones(3), images, noisy
    for exponent in exponents[:-1]:
        _, contrast_structure = ssim(y, x, data_range=1.0, reduction="none", return_contrast_sensitivity=True)
        expected *= contrast_structure.double().numpy() ** exponent
        halved = [a.numpy().reshape(3, 1, a.shape[2] // 2, 2, -1, 2).mean((3, 5)) for a in (x, y)]
        x, y = (torch.from_numpy(a) for a in halved)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True)
    last = [structural_similarity(a, b, data_range=1.0, **window) for a, b in pairs]
    np.testing.assert_allclose(found, expected * np.array(last) ** exponents[-1], rtol=1e-4)


def test_ms_ssim_is_near_torchmetrics() -> None:
    images, noisy = pair(224)
    expected = torchmetrics_ms_ssim(noisy, images, data_range=1.0, reduction="none", betas=SCALE_EXPONENTS)
    torch.testing.assert_close(1 - ms_ssim_distance(noisy, images) / 224**2, expected, rtol=1e-3, atol=0)


def test_ms_ssim_has_the_scales_that_fit() -> None:
    assert [num_scales(side) for side in (11, 21, 22, 64, 112, 175, 176, 224, 1024)] == [1, 1, 2, 3, 4, 4, 5, 5, 5]
    images, _ = pair(64)
    opposite = (1 - images).requires_grad_()
    ms_ssim_distance(opposite, images).sum().backward()  # whose structure is below 0
    assert opposite.grad.isfinite().all()


@pytest.mark.parametrize("side", [32, 50, 112])
def test_the_laplacian_pyramid_is_burt_and_adelsons(side: int) -> None:
    images, noisy = pair(side)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    for one, other, found in zip(images, noisy, laplacian_distance(noisy, images), strict=True):
        rest, expected = (other - one)[0].double().numpy(), 0.0
        for _ in range(5):
            coarser = ndimage.convolve(rest, kernel, mode="constant")[::2, ::2]
            spread = np.zeros_like(rest)
            spread[::2, ::2] = coarser
            band = rest - 4 * ndimage.convolve(spread, kernel, mode="constant")
            expected += abs(band).sum() * rest.size**-1 * side**2
            rest = coarser
        expected += abs(rest).mean() * side**2
        assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", RECONSTRUCTION_TERMS.values(), ids=RECONSTRUCTION_TERMS)
def test_terms_are_zero_for_equal_images_and_of_each_image_alone(term) -> None:
    images, noisy = pair(48)
    assert term(images, images).tolist() == pytest.approx([0, 0, 0], abs=2e-3)
    torch.testing.assert_close(term(noisy, images)[1:2], term(noisy[1:2], images[1:2]))
    assert (term(noisy, images) > 10).all()
    x = noisy[:1].double().float().requires_grad_()
    term(x, images[:1]).sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        up, down = (float(term(x + sign * 1e-3 * direction, images[:1])) for sign in (1, -1))
    assert float((x.grad * direction).sum()) == pytest.approx((up - down) / 2e-3, rel=0.05, abs=1)
