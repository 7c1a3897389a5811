import pytest
import torch

from cxr_vae.config_file import load_config
from cxr_vae.losses.adversarial import (
    LARGEST_WEIGHT,
    adaptive_weight,
    feature_matching_loss,
    generator_loss,
    hinge_discriminator_loss,
)
from cxr_vae.models import build_discriminator

CONFIG = load_config(None, ["adversarial_weight=1", "adversarial_channels=4"])


def test_logits_see_patches_of_70_pixels() -> None:
    discriminator = build_discriminator(CONFIG)
    for layer in discriminator.layers:  # a norm would let a logit see all of the image's statistics
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    images = torch.rand(1, 1, 224, 224).requires_grad_()
    *features, logits = discriminator(images)
    assert [maps.shape[1:] for maps in features] == [(4, 112, 112), (8, 56, 56), (16, 28, 28), (32, 27, 27)]
    assert logits.shape == (1, 1, 26, 26)
    logits[0, 0, 13, 13].backward()
    rows = images.grad[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70
    assert discriminator(torch.rand(2, 1, 24, 24))[-1].shape == (2, 1, 1, 1)


def test_the_discriminator_is_isolas_but_for_norm_and_bias() -> None:
    discriminator = build_discriminator(load_config(None, ["adversarial_weight=1"]))
    weights = 16 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 1)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == weights + 32 + 1 + 2 * (64 + 128 + 256)
    assert float(discriminator.layers[8].weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_the_discriminator_is_a_function_of_seed_and_image_alone() -> None:
    one, again = build_discriminator(CONFIG), build_discriminator(CONFIG)
    other = build_discriminator(load_config(None, ["seed=1", "adversarial_channels=4"]))
    assert torch.equal(one.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)
    images = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close([maps[1:2] for maps in one(images)], one(images[1:2]))


def test_losses_are_their_definitions() -> None:
    torch.manual_seed(0)
    real, fake = 2 * torch.randn(3, 1, 4, 4), 2 * torch.randn(3, 1, 4, 4)
    for number, found in enumerate(hinge_discriminator_loss(real, fake).tolist()):
        hinges = [max(0, 1 - logit) for logit in real[number].flatten().tolist()]
        hinges += [max(0, 1 + logit) for logit in fake[number].flatten().tolist()]
        assert found == pytest.approx(sum(hinges) / 32, rel=1e-5)
    assert hinge_discriminator_loss(real * 0 + 1, fake * 0 - 1).tolist() == [0, 0, 0]
    torch.testing.assert_close(generator_loss(fake), -fake.mean((1, 2, 3)))
    assert generator_loss(fake.bfloat16()).dtype == torch.float32
    pairs = [(torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5)), (real, fake)]
    for number, found in enumerate(feature_matching_loss(*zip(*pairs, strict=True)).tolist()):
        means = [sum(map(abs, (a[number] - b[number]).flatten().tolist())) / a[number].numel() for a, b in pairs]
        assert found == pytest.approx(sum(means), rel=1e-5)


def test_weighted_so_both_losses_pull_equally_hard() -> None:
    torch.manual_seed(0)
    discriminator, targets = build_discriminator(CONFIG), torch.rand(3, 1, 32, 32)
    images = torch.rand(3, 1, 32, 32).requires_grad_()
    (reconstruction,) = torch.autograd.grad((50 * (images - targets).square()).sum(), images)
    (adversarial,) = torch.autograd.grad(generator_loss(discriminator(images)[-1]).sum(), images)
    weights = adaptive_weight(reconstruction, adversarial)
    assert not weights.requires_grad
    for number in range(3):
        pull = weights[number] * adversarial[number]
        assert float(pull.norm()) == pytest.approx(float(reconstruction[number].norm()), rel=1e-2)
    torch.testing.assert_close(adaptive_weight(reconstruction[1:], adversarial[1:]), weights[1:])


def test_the_weight_is_bounded_where_there_is_no_gradient() -> None:
    zero, one = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    assert adaptive_weight(zero, zero).item() == 0
    assert adaptive_weight(zero, one).item() == 0
    assert adaptive_weight(1e6 * one, zero).item() == LARGEST_WEIGHT
    assert adaptive_weight(one * torch.nan, one).isnan()  # for the guard to see
