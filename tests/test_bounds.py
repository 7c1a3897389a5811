import numpy as np
import pytest
import torch
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from cxr_vae.evaluation.bounds import likelihood_figures, likeness, measure, unit_facts
from cxr_vae.models import VAE


class Linear(VAE):
    """Two latent units, the second of which the decoder doesn't use and the encoder leaves at the prior."""

    latent_shape = (2,)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        used = images.flatten(1).mean(1) * 4 - 2
        return torch.stack([used, 0 * used], 1), torch.stack([0 * used - 1, 0 * used], 1)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return latents[:, :1, None, None].expand(-1, 1, 8, 8) + 0.1


@pytest.fixture
def images() -> Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_importance_bound_goes_to_the_likelihood_and_one_sample_is_the_elbo(images: Tensor) -> None:
    """-log p(x) by integration over the one unit that counts."""
    _, found = measure(Linear(), images, None, 0, 0, 2000)
    grid = np.linspace(-8, 8, 20001)
    pixels = images.flatten(1).double().numpy()
    logits = grid + 0.1
    joint = pixels.sum(1)[:, None] * logits - 64 * np.logaddexp(0, logits) + stats.norm.logpdf(grid)
    expected = -np.log(np.trapezoid(np.exp(joint), grid, axis=1))
    error = found["importance_bound_nats"].numpy() - expected
    assert abs(error).max() < 0.15  # of 45 nats, from 2000 random samples
    assert abs(error.mean()) < 0.02
    assert (found["negative_elbo_nats"].mean() - expected.mean()) > 0.01

    one = torch.stack([measure(Linear(), images, None, 0, seed, 1)[1]["importance_bound_nats"] for seed in range(400)])
    elbos = torch.stack([measure(Linear(), images, None, 0, seed, 1)[1]["negative_elbo_nats"] for seed in range(400)])
    assert float(one.mean()) == pytest.approx(float(elbos.mean()), abs=0.15)  # of noise 2


def test_a_unit_that_says_nothing_is_not_active(images: Tensor) -> None:
    found = measure(Linear(), images, None, 0, 0, 4)[1]
    facts = unit_facts(found)
    assert (facts["active_units"], facts["num_units"]) == (1, 2)
    figures = likelihood_figures(found, 8)
    assert sum(facts["kl_nats_per_unit"]) == pytest.approx(figures["kl_nats"].value, abs=1e-4)
    bound = figures["importance_bound_nats"]
    assert figures["bits_per_dim"].value == pytest.approx(bound.value / (64 * np.log(2)))
    assert bound.standard_error == pytest.approx(stats.sem(found["importance_bound_nats"].numpy()))


def test_noise_depends_on_the_position_alone(images: Tensor) -> None:
    whole, part = measure(Linear(), images, None, 64, 3, 4)[1], measure(Linear(), images[10:], None, 74, 3, 4)[1]
    for name in whole:
        assert torch.allclose(whole[name][10:], part[name], rtol=1e-5), name


def test_psnr_and_ssim_are_scikit_images() -> None:
    torch.manual_seed(0)
    a = torch.rand(3, 1, 32, 32)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    found = likeness(a, b)
    for number in range(3):
        x, y = a[number, 0].numpy(), b[number, 0].numpy()
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = structural_similarity(x, y, data_range=1.0, **window)
        assert float(found["ssim"][number]) == pytest.approx(expected, abs=2e-2)  # they differ at the border
        assert float(found["psnr_db"][number]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-4)
