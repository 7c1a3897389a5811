import pytest
import torch

from cxr_vae.config import ObjectiveConfig
from cxr_vae.losses.elbo import Output, kl_per_unit, kl_with_free_bits, negative_elbo
from cxr_vae.losses.likelihoods import LIKELIHOODS
from cxr_vae.losses.objective import objective
from cxr_vae.losses.reconstruction_terms import RECONSTRUCTION_TERMS, laplacian_distance, ms_ssim_distance
from tests.test_reconstruction_terms import pair


def output(*latent: int) -> tuple[Output, torch.Tensor]:
    torch.manual_seed(0)
    images, _ = pair(32)
    return Output(
        torch.randn(3, 1, 32, 32), torch.randn(3, *latent), torch.randn(3, *latent), torch.tensor(-1.0)
    ), images


@pytest.mark.parametrize("latent", [(6,), (2, 3, 5)])
def test_free_bits_are_free_and_a_matter_of_each_image(latent: tuple[int, ...]) -> None:
    out, _ = output(*latent)
    per_unit = kl_per_unit(out.mean, out.logvar).double().numpy().reshape(3, latent[0], -1)
    expected = [sum(max(channel.mean(), 0.7) * channel.size for channel in image) for image in per_unit]
    found = kl_with_free_bits(out.mean, out.logvar, 0.7)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(kl_with_free_bits(out.mean[:1], out.logvar[:1], 0.7), found[:1])
    near = torch.full((1, *latent), 0.1).requires_grad_()  # a KL of 0.005
    kl_with_free_bits(near, torch.zeros(1, *latent), 0.01).sum().backward()
    assert not near.grad.any()


def test_each_option_weighs_the_term_it_names() -> None:
    assert RECONSTRUCTION_TERMS["laplacian_weight"] is laplacian_distance
    assert RECONSTRUCTION_TERMS["ms_ssim_weight"] is ms_ssim_distance


def test_what_is_reported_is_the_elbo_whatever_is_minimised() -> None:
    out, images = output(4)
    plain = negative_elbo(out, images, "gaussian")
    for options in (
        {},
        {"free_bits": 0.5},
        *({name: 2.0} for name in RECONSTRUCTION_TERMS),
        {"ms_ssim_weight": 0.5, "laplacian_weight": 1.0},
    ):
        config = ObjectiveConfig(likelihood="gaussian", **options)
        losses, minimised = objective(out, images, config, 0.25)
        assert all(torch.equal(one, other) for one, other in zip(losses, plain, strict=True))
        kl = kl_with_free_bits(out.mean, out.logvar, config.free_bits)
        mean = LIKELIHOODS["gaussian"].image(out.logits)
        extra = sum(getattr(config, name) * term(mean, images) for name, term in RECONSTRUCTION_TERMS.items())
        torch.testing.assert_close(minimised, plain.reconstruction + 0.25 * kl + extra)
    assert torch.equal(
        objective(out, images, ObjectiveConfig(), 0.25)[1], negative_elbo(out, images, "bernoulli").total(0.25)
    )
