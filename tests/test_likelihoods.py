"""Likelihoods against their definitions: normalisation, scipy, finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from cxr_vae.losses.elbo import Output, negative_elbo
from cxr_vae.losses.likelihoods import LIKELIHOODS

LEVELS = torch.arange(256) / 255
LOGITS = [-200.0, -12.0, -3.0, -0.21, -0.19, -1e-3, 0.0, 1e-6, 0.1, 0.5, 4.0, 30.0]


def nats(name: str, logit: float, images: Tensor, log_scale: float = 0.0) -> Tensor:
    """Of each of n pixel values under one logit, (n,) float32."""
    images = images.reshape(-1, 1, 1, 1)
    return LIKELIHOODS[name].nll(torch.full_like(images, logit), images, torch.tensor(log_scale))


@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0])
@pytest.mark.parametrize("logit", LOGITS)
def test_the_masses_of_the_grey_levels_sum_to_one(logit: float, log_scale: float) -> None:
    assert float(torch.exp(-nats("discretized_logistic", logit, LEVELS, log_scale).double()).sum()) == pytest.approx(
        1, abs=1e-4
    )


def test_the_mass_of_a_grey_level_is_that_of_the_logistic() -> None:
    for logit, log_scale in ((0.3, -2.0), (-1.0, -4.0), (2.0, 0.0)):
        logistic = stats.logistic(1 / (1 + np.exp(-logit)), np.exp(log_scale))
        edges = [-np.inf, *((np.arange(255) + 0.5) / 255), np.inf]
        with np.errstate(divide="ignore"):
            expected = -np.log(np.diff(logistic.cdf(edges)))
        found = nats("discretized_logistic", logit, LEVELS, log_scale).double().numpy()
        sure = expected < 15  # differences of cumulative masses have no more digits
        np.testing.assert_allclose(found[sure], expected[sure], rtol=1e-3, atol=1e-4)
    assert nats("discretized_logistic", -200.0, LEVELS, -9.0).isfinite().all()


@pytest.mark.parametrize("logit", LOGITS)
def test_the_continuous_bernoulli_is_a_density_with_the_mean_it_says(logit: float) -> None:
    def log_density(x: float) -> float:
        """From the paper's λ and C(λ), in float64, or its limit where λ is 1/2 but for rounding."""
        rate = 1 / (1 + math.exp(-logit))
        log_c = math.log(2 * math.atanh(1 - 2 * rate) / (1 - 2 * rate)) if abs(logit) > 1e-4 else math.log(2)
        return x * math.log(rate) + (1 - x) * math.log(1 - rate) + log_c

    grid = torch.linspace(0, 1, 100_001)
    density = torch.exp(-nats("continuous_bernoulli", logit, grid).double()).numpy()
    assert integrate.simpson(density, x=grid.numpy()) == pytest.approx(1, abs=2e-5)
    image = LIKELIHOODS["continuous_bernoulli"].image(torch.tensor(logit))
    assert float(image) == pytest.approx(integrate.simpson(density * grid.numpy(), x=grid.numpy()), abs=2e-5)
    if abs(logit) < 20:
        expected = [-log_density(float(x)) for x in grid[::20_000]]
        assert nats("continuous_bernoulli", logit, grid[::20_000]).tolist() == pytest.approx(
            expected, rel=1e-5, abs=2e-6
        )


def test_the_gaussian_is_scipys() -> None:
    torch.manual_seed(0)
    logits, images = torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    found = LIKELIHOODS["gaussian"].nll(logits, images, torch.tensor(-1.7))
    means = 1 / (1 + np.exp(-logits.double().numpy()))
    expected = -stats.norm.logpdf(images.double().numpy(), means, np.exp(-1.7)).sum((1, 2, 3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_the_best_deviation_is_the_error_itself() -> None:
    """σ-VAE, section 3.2: the likelihood is highest where σ is the root of the mean squared error."""
    torch.manual_seed(0)
    logits, images = torch.zeros(4, 1, 16, 16), 0.5 + 0.05 * torch.randn(4, 1, 16, 16)
    log_scale = (images - 0.5).square().mean().sqrt().log().requires_grad_()
    LIKELIHOODS["gaussian"].nll(logits, images, log_scale).sum().backward()
    assert float(log_scale.grad) == pytest.approx(0, abs=0.05)  # of terms that are 1024 each


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    for logit in LOGITS[1:-1]:
        x = torch.tensor(logit).requires_grad_()
        scale = torch.tensor(-1.0).requires_grad_()
        image = torch.tensor([[[[77 / 255]]]])
        LIKELIHOODS[name].nll(x.expand(1, 1, 1, 1), image, scale).sum().backward()
        step = 0.01
        for parameter, change in ((x, (step, 0.0)), (scale, (0.0, step))):
            up, down = (float(nats(name, logit + sign * change[0], image, -1 + sign * change[1])) for sign in (1, -1))
            found = 0.0 if parameter.grad is None else float(parameter.grad)
            assert found == pytest.approx((up - down) / (2 * step), abs=2e-3), logit


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("logit", [*LOGITS, 100.0, 1e4, -1e4])
def test_the_image_has_the_gradient_that_it_should(name: str, logit: float) -> None:
    """Which the adversarial loss and the pixels' terms train by: also where a decoder is sure of black or white."""
    at = torch.tensor(logit).requires_grad_()
    LIKELIHOODS[name].image(at).backward()
    step = 0.01
    up, down = (float(LIKELIHOODS[name].image(torch.tensor(logit + change))) for change in (step, -step))
    assert float(at.grad) == pytest.approx((up - down) / (2 * step), abs=2e-4)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_they_are_float32_a_function_of_each_image_and_finite_at_extremes(name: str) -> None:
    torch.manual_seed(0)
    logits, images = (torch.randn(4, 1, 8, 8) * 30).bfloat16(), LEVELS[torch.randint(0, 256, (4, 1, 8, 8))]
    start = torch.tensor(LIKELIHOODS[name].start_log_scale or 0.0)
    logits.requires_grad_()
    output = Output(logits, torch.zeros(4, 2), torch.zeros(4, 2), start)
    with torch.autocast("cpu", torch.bfloat16):
        found = negative_elbo(output, images, name).reconstruction
        image = LIKELIHOODS[name].image(logits)
    assert found.shape == (4,)
    assert found.dtype == image.dtype == torch.float32
    alone = [LIKELIHOODS[name].nll(logits[i : i + 1], images[i : i + 1], start) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone))
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert 0 <= image.min() <= image.max() <= 1
