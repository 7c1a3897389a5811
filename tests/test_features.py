import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch_fidelity
import torchvision
from PIL import Image

from cxr_vae.config import EvaluateConfig
from cxr_vae.errors import UserError
from cxr_vae.evaluation.block_store import BlockStore
from cxr_vae.evaluation.features import Features, build_inception, choose_network, load_network
from cxr_vae.evaluation.metrics import compare
from cxr_vae.files import sha256_of
from tests.helpers import draw_image


@pytest.fixture(scope="module")
def images() -> dict[str, torch.Tensor]:
    """Two sets of 24 images (24, 1, 64, 64) uint8."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(brighter: bool) -> torch.Tensor:
        squares = [draw_image(rng, brighter=brighter).resize((64, 64)) for _ in range(24)]
        return torch.stack([torch.from_numpy(np.array(square))[None] for square in squares])

    return {"a": draw(False), "b": draw(True)}


def test_figures_are_torch_fidelitys_on_the_same_pngs_and_weights(images, tmp_path: Path) -> None:
    network = load_network("random", torch.device("cpu"))
    weights = tmp_path / "weights.pth"
    torch.save(build_inception("random")[0].state_dict(), weights)
    for name, tensors in images.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(tensors):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / f"{number:06d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        **dict.fromkeys(("isc", "fid", "kid"), True),
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=24,
        isc_splits=4,
        kid_subset_size=24,
        kid_subsets=1,
        feature_extractor_weights_path=str(weights),
    )
    # Extracted in two batches, so that nothing may depend on how images are batched.
    parts = {name: [network(part) for part in tensors.split(16)] for name, tensors in images.items()}
    features = [Features(*(torch.cat(layer) for layer in zip(*parts[name], strict=True))) for name in ("a", "b")]
    figures = {name: figure.value for name, figure in compare(*features, EvaluateConfig(is_splits=4)).items()}
    assert figures["frechet"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    # Theirs takes the difference of sums of about 1 in float32, whose steps are 1.2e-7; in float64: test_metrics.
    assert figures["kernel"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4, abs=1e-6)
    assert figures["score"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)


def test_random_network_is_the_same_each_time_and_tells_sets_apart(images) -> None:
    one, two = (load_network("random", torch.device("cpu")) for _ in range(2))
    assert one.weights_sha256 == two.weights_sha256
    features = one(images["a"][:4])
    assert features.pooled.shape == (4, 2048)
    assert features.logits.shape == (4, 1008)
    assert features.pooled.dtype == torch.float32
    assert torch.equal(features.pooled, two(images["a"][:4]).pooled)
    assert 0.01 < features.pooled.std() < 100  # neither dead nor exploding through 94 layers
    between = (features.pooled.mean(0) - one(images["b"][:4]).pooled.mean(0)).norm()
    assert between > 1e-3 * features.pooled.norm()


def test_random_is_chosen_only_where_it_was_asked_for(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert choose_network("random") == "random"
    monkeypatch.setattr(
        "cxr_vae.evaluation.inception_weights.URL", "http://127.0.0.1:9/none.pth"
    )  # nobody listens there
    assert choose_network("auto") == "random"
    assert "no Inception weights here" in capsys.readouterr().out


def test_a_network_of_ones_own(images, tmp_path: Path) -> None:
    """The example: features are those of the network before its last layer."""
    torch.manual_seed(0)
    network = torchvision.models.densenet121(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    name = "cxr_vae.evaluation.torchvision_features:densenet121"
    ours = load_network(name, torch.device("cpu"), str(tmp_path / "weights.pth"))
    features = ours(images["a"][:4])
    assert features.logits is None
    assert features.pooled.shape == (4, 1024)
    resized = torch.nn.functional.interpolate(images["a"][:4] / 255, (224, 224), mode="bilinear", antialias=True)
    normalised = torchvision.transforms.functional.normalize(
        resized.expand(-1, 3, -1, -1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.inference_mode():
        expected = network.classifier(features.pooled)
        assert torch.allclose(network(normalised), expected, atol=1e-5)
    assert ours.facts()["network"] == name
    assert "224 x 224" in ours.facts()["resize"]
    assert set(compare(features, features, EvaluateConfig())) >= {"frechet", "kernel", "coverage"}

    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for features_name, weights, told in (
        (name, tmp_path / "weights.pth", "is not a state_dict of torchvision's densenet121"),
        (name, tmp_path / "none.pth", "no such file"),
        (name, None, "features_weights should name a file"),
        ("cxr_vae.nothing:here", None, "No module named"),
        ("cxr_vae.noise:nothing", None, "has no attribute"),
        ("tests.test_features:no_network", None, "gives a str"),
    ):
        with pytest.raises(UserError, match=told):
            load_network(features_name, torch.device("cpu"), weights and str(weights))


def test_a_changed_network_of_ones_own_is_another(images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code has changed, its name, weights and words haven't: kept features of the earlier one aren't taken."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x): return x.flatten(1).float() * {}\n"
    code += "def mean(weights): return Mean()\n"
    stores, files = [], []
    for factor in (1, 2):
        (tmp_path / "edited_features.py").write_text(code.format(factor))
        sys.modules.pop("edited_features", None)
        importlib.invalidate_caches()
        network = load_network("edited_features:mean", torch.device("cpu"))
        assert network(images["a"][:1]).pooled.max() == factor * images["a"][0].float().max()
        files.append(sha256_of(tmp_path / "edited_features.py"))
        stores.append(BlockStore(tmp_path, {"features": network.facts()}).folder)
        assert network.facts()["code_sha256"] == files[-1]
    assert stores[0] != stores[1]
    assert "code_sha256" not in load_network("random", torch.device("cpu")).facts()


def no_network(weights: Path | None) -> str:
    return "nothing"
