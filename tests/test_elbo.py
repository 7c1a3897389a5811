import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cxr_vae.losses.elbo import Output, bits_per_dim, kl_to_standard_normal, negative_elbo
from cxr_vae.losses.likelihoods import bernoulli_nll


def reference(logits: torch.Tensor, images: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor):
    """The same in float64 from torch.distributions and from the definition of the cross-entropy."""
    logits, images, mean, logvar = (tensor.double() for tensor in (logits, images, mean, logvar))
    p = torch.sigmoid(logits)
    nll = -(images * p.log() + (1 - images) * (1 - p).log()).sum(dim=(1, 2, 3))
    posterior = Normal(mean, (0.5 * logvar).exp())
    return nll, kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)


def test_terms_agree_with_an_independent_float64_computation() -> None:
    torch.manual_seed(0)
    logits, images = torch.randn(6, 1, 32, 32) * 3, torch.rand(6, 1, 32, 32)
    mean, logvar = torch.randn(6, 16), torch.randn(6, 16) * 2
    losses = negative_elbo(Output(logits, mean, logvar, torch.zeros(())), images, "bernoulli")
    nll, kl = reference(logits, images, mean, logvar)
    assert losses.reconstruction.shape == losses.kl.shape == (6,)
    torch.testing.assert_close(losses.reconstruction.double(), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses.total(0.25).double(), nll + 0.25 * kl, rtol=1e-6, atol=0)


def test_everything_is_float32_under_autocast_and_from_half_precision() -> None:
    torch.manual_seed(0)
    logits, images = torch.randn(2, 1, 64, 64).bfloat16(), torch.rand(2, 1, 64, 64)
    mean, logvar = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = negative_elbo(Output(logits, mean, logvar, torch.zeros(())), images, "bernoulli")
    nll, kl = reference(logits, images, mean, logvar)
    assert losses.reconstruction.dtype == losses.kl.dtype == torch.float32
    torch.testing.assert_close(losses.reconstruction.double(), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.kl.double(), kl, rtol=1e-5, atol=1e-4)


def test_extreme_logits_stay_finite_and_right() -> None:
    logits = torch.tensor([200.0, -200.0, 200.0, -200.0]).reshape(1, 1, 2, 2)
    images = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert bernoulli_nll(logits, images).item() == 400  # sigmoid and logarithm would give inf or a clamp


def test_kl_is_zero_only_at_the_prior() -> None:
    zero = torch.zeros(1, 4)
    assert kl_to_standard_normal(zero, zero).item() == 0
    assert kl_to_standard_normal(zero + 0.1, zero).item() == pytest.approx(4 * 0.5 * 0.01)


def test_bits_per_dim() -> None:
    assert bits_per_dim(math.log(2) * 32 * 32, 32) == pytest.approx(1)
