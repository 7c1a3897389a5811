import pytest
import torch

from cxr_vae.config_file import load_config
from cxr_vae.models import MODELS, build_model


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
    config = load_config(None, [f"model.name={name}", f"image_size={image_size}", "latent_dim=3"])
    model = build_model(config).eval()
    images, noise = torch.rand(2, 1, image_size, image_size), torch.randn(2, *model.latent_shape)
    output = model(images, noise)
    assert output.logits.shape == images.shape
    assert output.mean.shape == output.logvar.shape == (2, 3)


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
