"""`cxr-vae prior`, and what is drawn from it, as a user calls it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory
from cxr_vae.distributed import World
from cxr_vae.files import sha256_of
from cxr_vae.noise import BLOCK, normal, uniform
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.sampler import open_sampler
from cxr_vae.training.latents import encode_split
from cxr_vae.weights import load_vae
from tests.helpers import check_sentence, cxr_vae

HERE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fitted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a mixture, and what fitting it said."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("fitted") / "run")
    result = cxr_vae("prior", run, "name=gmm", "num_components=2")
    assert result.returncode == 0, result.stderr
    return run, result.stdout


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_it_says_what_was_fitted_and_does_nothing_the_second_time(fitted: tuple[Path, str]) -> None:
    run, said = fitted
    path = run / "priors" / "gmm.safetensors"
    assert "2 components for NORMAL, 2 components for PNEUMONIA, fitted to 70 images of the train split" in said
    before = path.stat().st_mtime_ns
    assert "already fitted so" in cxr_vae("prior", run, "name=gmm", "prior.num_components=2").stdout
    assert path.stat().st_mtime_ns == before


def test_samples_of_a_class_are_those_of_its_mixture(fitted: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = fitted
    call = ("generate", run, "--prior", "gmm", "--num", 66)
    for name, options in {
        "all": (),
        "one": ("--label", "PNEUMONIA"),
        "zero": ("--label", "NORMAL"),
        "few": ("--num", 3),
    }.items():
        assert cxr_vae(*call, *options, "--out", tmp_path / name).returncode == 0
    every, one, zero, few = (images(tmp_path / name) for name in ("all", "one", "zero", "few"))
    assert few == every[:3]
    shares = uniform(0, "label", 0, 2 * BLOCK)[:66]
    expected = [one[i] if share > 28 / 70 else zero[i] for i, share in enumerate(shares.tolist())]
    assert every == expected
    facts = json.loads((tmp_path / "one" / "images.json").read_text())
    assert facts["prior_sha256"] == sha256_of(run / "priors" / "gmm.safetensors")
    assert (facts["prior"], facts["label"], facts["temperature"]) == ("gmm", "PNEUMONIA", 1.0)


def test_two_processes_draw_the_same(fitted: tuple[Path, str], tmp_path: Path) -> None:
    call = ("generate", fitted[0], "--prior", "gmm", "--num", 70)
    assert cxr_vae(*call, "--out", tmp_path / "one").returncode == 0
    assert cxr_vae(*call, "--out", tmp_path / "two", ranks=2).returncode == 0
    assert images(tmp_path / "one") == images(tmp_path / "two")


def test_the_standard_prior_is_as_it_was(fitted: tuple[Path, str]) -> None:
    run = RunDir(fitted[0])
    model, config = load_vae(run.weights)
    sampler = open_sampler(run, model, config, torch.device("cpu"), temperature=0.5)
    assert torch.equal(sampler.latents(0, None, HERE.device), 0.5 * normal(config.seed, "generate", 0, BLOCK, (4,)))
    assert sampler.facts == {
        "weights_sha256": sha256_of(run.weights),
        "seed": config.seed,
        "prior": "normal of standard deviation 0.5",
    }


def test_an_evaluation_measures_the_prior_that_is_named(fitted: tuple[Path, str]) -> None:
    run, _ = fitted
    options = ("features=random", "num_generated=10", "num_real=10", "is_splits=2")
    results = {}
    for name in ("standard", "gmm"):
        result = cxr_vae("evaluate", run, *options, f"prior.name={name}")
        assert result.returncode == 0, result.stderr
        assert "already evaluated so" not in result.stdout
        results[name] = json.loads((run / "evaluation" / "evaluation_results.json").read_text())
    assert results["gmm"]["generated"]["prior"] == "gmm"
    assert results["standard"]["generated"]["prior"] == "standard normal"
    values = [result["figures"]["frechet_random"]["value"] for result in results.values()]
    assert values[0] != values[1]
    assert "already evaluated so" in cxr_vae("evaluate", run, *options, "prior.name=gmm").stdout


def test_the_posteriors_are_the_networks_in_stored_order(trained: Path, shards: Path) -> None:
    model, _ = load_vae(trained / "vae_final.safetensors")
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=1)
    mean, logvar, labels = encode_split(model, dataset, HERE)
    with torch.inference_mode():
        expected = model.encode(dataset.images([69]) / 255)
    torch.testing.assert_close((mean[69:], logvar[69:]), expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == dataset.index.labels.tolist()
    assert len(mean) == 70


class TestMistakes:
    """One sentence, exit code 2."""

    def test_a_prior_that_is_not_fitted_yet(self, trained: Path, tmp_path: Path) -> None:
        result = cxr_vae("generate", trained, "--prior", "flow", "--out", tmp_path / "x")
        check_sentence(result, "has no flow prior yet: fit it with `cxr-vae prior", "name=flow")

    def test_an_unknown_class(self, fitted: tuple[Path, str], tmp_path: Path) -> None:
        result = cxr_vae("generate", fitted[0], "--prior", "gmm", "--label", "FLU", "--out", tmp_path / "x")
        check_sentence(result, "label FLU: there is no such class; there are NORMAL, PNEUMONIA")

    def test_a_class_of_a_prior_that_knows_none(self, trained: Path, tmp_path: Path) -> None:
        result = cxr_vae("generate", trained, "--label", "NORMAL", "--out", tmp_path / "x")
        check_sentence(result, "the standard prior of this run knows no classes")

    def test_other_weights(self, fitted: tuple[Path, str], tmp_path: Path) -> None:
        run = shutil.copytree(fitted[0], tmp_path / "run")
        content = bytearray((run / "vae_final.safetensors").read_bytes())
        content[-1] ^= 1
        (run / "vae_final.safetensors").write_bytes(content)
        result = cxr_vae("generate", run, "--prior", "gmm", "--out", tmp_path / "x")
        check_sentence(result, "was fitted to other weights")

    def test_a_prior_for_other_latents(self, trained: Path) -> None:
        check_sentence(cxr_vae("prior", trained, "name=flow_matching"), "is for spatial latents")

    def test_an_option_of_the_training(self, trained: Path) -> None:
        check_sentence(cxr_vae("prior", trained, "latent_dim=3"), "settled by the training run")

    def test_a_loss_that_explodes(self, trained: Path, tmp_path: Path) -> None:
        run = shutil.copytree(trained, tmp_path / "run")
        line = check_sentence(cxr_vae("prior", run, "name=flow", "prior.lr=1e30", "warmup_steps=0"), "no finite number")
        assert "lower prior.lr or use train.precision=fp32; the checkpoints" in line  # options that `prior` takes

    def test_a_name_that_is_none(self, trained: Path, tmp_path: Path) -> None:
        check_sentence(cxr_vae("generate", trained, "--prior", "gmn", "--out", tmp_path / "x"), "prior.name", "gmn")
