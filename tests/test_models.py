import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cxr_vae.commands.export import Decoder
from cxr_vae.config_file import load_config
from cxr_vae.losses.elbo import negative_elbo
from cxr_vae.losses.likelihoods import LIKELIHOODS
from cxr_vae.models import MODELS, VAE, build_model
from cxr_vae.models.blocks import Attention, ResidualBlock
from cxr_vae.training.efficiency import flops_per_image


def test_the_reference_model_is_the_reference() -> None:
    model = build_model(load_config("configs/reference.yaml"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_235_137
    mean, logvar = model.encode(torch.rand(2, 1, 224, 224))
    assert mean.shape == logvar.shape == (2, 128)
    features = model.encoder[:5](torch.rand(2, 1, 224, 224))
    assert features.shape == (2, 512, 7, 7)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_size", [32, 96, 160])
def test_shapes_for_any_size_the_architecture_allows(name: str, image_size: int) -> None:
    own = {"residual": ["model.channels=[4, 8, 8]", "latent_channels=3"]}.get(name, ["latent_dim=3"])
    config = load_config(None, [f"model.name={name}", f"image_size={image_size}", *own])
    model = build_model(config).eval()
    images, noise = torch.rand(2, 1, image_size, image_size), torch.randn(2, *model.latent_shape)
    output = model(images, noise)
    assert output.logits.shape == images.shape
    assert output.log_scale.shape == ()
    latent = (3, image_size // 4, image_size // 4) if name == "residual" else (3,)
    assert output.mean.shape == output.logvar.shape == (2, *latent)
    mean_images = model.image(output.mean)
    assert mean_images.shape == images.shape
    assert mean_images.dtype == torch.float32
    assert 0 <= mean_images.min() <= mean_images.max() <= 1


def test_reparameterisation() -> None:
    config = load_config(None, ["image_size=32", "channels=[4, 8]", "latent_dim=5"])
    model = build_model(config).eval()
    images, noise = torch.rand(3, 1, 32, 32), torch.randn(3, 5)
    output = model(images, noise)
    latents = output.mean + torch.exp(0.5 * output.logvar) * noise  # Kingma and Welling, 2014, sec. 2.4
    torch.testing.assert_close(output.logits, model.decode(latents))


def test_posterior_stays_float32_under_autocast() -> None:
    model = build_model(load_config(None, ["image_size=32", "channels=[4, 8]"]))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.rand(2, 1, 32, 32), torch.zeros(2, 128))
    assert output.mean.dtype == output.logvar.dtype == torch.float32


def test_an_absurd_log_variance_is_clamped() -> None:
    model = build_model(load_config(None, ["image_size=32", "channels=[4, 8]"])).eval()
    torch.nn.init.constant_(model.to_logvar.bias, 1e4)
    output = model(torch.rand(2, 1, 32, 32), torch.randn(2, 128))
    assert output.logits.isfinite().all()
    assert output.logvar.max() == 20


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = build_model(load_config(None, ["seed=1", "image_size=32"]))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # global random state was left alone
    again, other = (build_model(load_config(None, [f"seed={seed}", "image_size=32"])) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.to_mean.weight, other.to_mean.weight)


RESIDUAL = ("model.name=residual", "image_size=32", "model.channels=[4, 8, 16]", "latent_channels=2")


def shaken(*options: str) -> VAE:
    """A small residual model none of whose weights is 0, as after some training."""
    model = build_model(load_config(None, [*RESIDUAL, *options])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_residual_model_has_the_size_that_is_stated() -> None:
    config = load_config(None, ["model.name=residual"])
    model = build_model(config)
    assert model.latent_shape == (4, 28, 28)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_501_529
    assert flops_per_image(config) == pytest.approx(37.19e9, rel=1e-3)
    assert flops_per_image(load_config(None, ["model.name=residual", "num_classes=2"])) == flops_per_image(config)


def test_blocks_and_attention_start_as_the_identity() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(2, 8, 6, 6), torch.tensor([0, 1])
    assert torch.equal(ResidualBlock(8, 2)(features, labels), features)
    assert torch.equal(Attention(8)(features), features)


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    attention, features = Attention(8), torch.randn(2, 8, 4, 6)
    torch.nn.init.normal_(attention.out.weight)
    q, k, v = attention.to_qkv(attention.norm(features)).flatten(2).transpose(1, 2).chunk(3, dim=2)
    seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(attention(features), features + attention.out(seen))


def test_an_image_of_the_residual_model_depends_on_itself_alone() -> None:
    model, images, noise = shaken(), torch.rand(3, 1, 32, 32), torch.randn(3, 2, 8, 8)
    whole, part = model(images, noise), model(images[1:2], noise[1:2])
    for together, alone in zip(whole[:3], part[:3], strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert (whole.logits[0] - whole.logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str, likelihood: str) -> None:
    own = RESIDUAL if name == "residual" else ("image_size=32", "model.channels=[4, 8]")
    config = load_config(None, [*own, f"likelihood={likelihood}", "num_classes=2"])
    model = build_model(config)
    torch.nn.init.normal_(next(model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    output = model(torch.rand(2, 1, 32, 32), torch.randn(2, *model.latent_shape), torch.tensor([0, 1]))
    assert output.log_scale.dtype == torch.float32
    negative_elbo(output, torch.rand(2, 1, 32, 32), likelihood).total().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        if "before.2.bias" not in parameter_name:  # of which a norm may leave nothing
            assert parameter.grad.abs().sum() > 0, parameter_name
    learned = LIKELIHOODS[likelihood].start_log_scale is not None
    assert ("log_scale" in model.state_dict()) == learned
    assert bool(output.log_scale) == learned


@pytest.mark.parametrize("name", MODELS)
def test_labels_change_the_decoder_once_it_has_learned(name: str) -> None:
    own = RESIDUAL if name == "residual" else ("image_size=32", "model.channels=[4, 8]")
    plain, conditional = (build_model(load_config(None, [*own, *more])).eval() for more in ([], ["num_classes=2"]))
    conditional.load_state_dict(plain.state_dict(), strict=False)
    latents = torch.randn(1, *plain.latent_shape).expand(2, *plain.latent_shape)
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(conditional.decode(latents, labels), plain.decode(latents))  # at first they say nothing
    with torch.no_grad():
        for parameter in conditional.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one, other = conditional.image(latents, labels)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(conditional.image(latents.flip(0), labels.flip(0)), torch.stack([other, one]))
    with pytest.raises(ValueError, match="needs labels"):
        conditional.decode(latents)
    with pytest.raises(ValueError, match="takes no labels"):
        plain.decode(latents, labels)


def test_the_residual_model_runs_in_bf16_and_channels_last() -> None:
    model = shaken("likelihood=gaussian").to(memory_format=torch.channels_last)
    images, noise = torch.rand(2, 1, 32, 32), torch.randn(2, 2, 8, 8)
    exact = model(images, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
    assert output.mean.dtype == output.logvar.dtype == output.log_scale.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - exact.logits).abs().max() < 0.1 * exact.logits.abs().max()


def test_the_residual_decoder_is_one_program() -> None:
    model = shaken()
    program = torch.export.export(
        Decoder(model), (torch.zeros(2, 2, 8, 8),), dynamic_shapes=({0: torch.export.Dim("b")},)
    )
    latents = torch.randn(5, 2, 8, 8)
    torch.testing.assert_close(program.module()(latents), model.image(latents))
