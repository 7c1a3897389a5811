"""All that a recommended run consists of, together: spatial latents, a learned scale, classes, an adversarial loss, an
average of weights, and a prior. It resumes exactly, ranks agree, and evaluation, audit and report show it."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from cxr_vae.checkpoints.manifest import published
from cxr_vae.config_file import override_config
from cxr_vae.data.dataset import open_dataset, open_split, to_float
from cxr_vae.distributed import World
from cxr_vae.evaluation.bounds import measure
from cxr_vae.losses.elbo import kl_to_standard_normal
from cxr_vae.noise import normal
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.sampler import open_sampler
from cxr_vae.stopping import STOPPED_EXIT_CODE
from cxr_vae.training.run_log import read_epochs, read_records
from cxr_vae.training.validation import draw_grids
from cxr_vae.training.validation import test_losses as losses_of_split
from cxr_vae.weights import load_vae
from tests.helpers import HANG_S, check_sentence, command, cxr_vae, held_after
from tests.page_helpers import read_page, section, text_of

HERE = World(0, 1, 0, 1, torch.device("cpu"))

RECIPE = (
    *("image_size=32", "model.name=residual", "model.norm=group", "model.channels=[8, 8, 16]", "latent_dim=null"),
    *(
        "latent_channels=2",
        "num_classes=2",
        "likelihood=gaussian",
        "batch_size=14",
        "precision=fp32",
        "device=cpu",
        "log_every=1",
    ),
    *("adversarial_weight=0.5", "feature_matching_weight=10", "adversarial_start_step=6", "adversarial_channels=4"),
    "ema_decay=0.9",
    *("epochs=4", "checkpoint.every_steps=4", "grid_every=2"),
)
"""20 steps; checkpoints before and after the discriminator comes in."""

FIELD = (
    *("name=flow_matching", "prior.channels=[8, 16]", "prior.num_blocks=1", "prior.num_steps=3", "warmup_steps=5"),
    *("prior.guide_channels=[8]", "prior.autoguidance=1.5"),
)
FLOW = ("name=flow", "prior.num_layers=2", "prior.width=16")
PRIOR = ("prior.batch_size=14", "train.log_every=1", "checkpoint.every_steps=7", "train.precision=fp32")


def train(shards: Path, run: Path) -> list[str]:
    return ["train", "configs/reference.yaml", *RECIPE, f"data.shards={shards}", f"run_dir={run}"]


@pytest.fixture(scope="module")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, undisturbed, with the class frequencies that its decoder's standard prior needs."""
    run = tmp_path_factory.mktemp("recipe") / "run"
    for call in (train(shards, run), ["prior", run, "name=standard"]):
        result = cxr_vae(*call)
        assert result.returncode == 0, result.stderr
    return run


def copy_of(run: Path, folder: Path) -> Path:
    """A finished run's weights, without what was made of them."""
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("priors", "evaluation", "checkpoints"))
    return folder / "run"


def end_after(call: list[Any], run: Path, metrics: Path, steps: int, number: signal.Signals) -> int:
    """Starts a command and sends it a signal once it has logged so many steps; returns its exit code."""
    held, _ = held_after(steps + 2, run.parent)
    process = subprocess.Popen(
        command("cxr-vae", *call), env=held, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(read_records(metrics)) < steps:
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be told to"
    process.send_signal(number)
    return process.wait(HANG_S)


def test_killed_it_ends_the_same_bit_for_bit(shards: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    end_after(train(shards, run), run, run / "metrics.jsonl", 9, signal.SIGKILL)
    result = cxr_vae(*train(shards, run))
    assert result.returncode == 0, result.stderr
    assert "going on from step-00000000" in result.stdout
    names = ("vae_final.safetensors", "metrics.jsonl")
    assert [(run / name).read_bytes() for name in names] == [(recipe / name).read_bytes() for name in names]
    one, two = (last_state(path) for path in (run, recipe))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    kinds = {name.split(".")[0] for name in one}
    assert kinds == {
        *("model", "optimizer", "critic", "critic_optimizer", "ema", "epoch_sums", "lowest_test_loss", "counters")
    }


def last_state(run: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds."""
    newest = published(run / "checkpoints")[0]
    assert newest.name == "step-0000000020"
    return {name: t for part in sorted(newest.glob("*.safetensors")) for name, t in load_file(part).items()}


def test_the_discriminator_comes_in_at_its_step(recipe: Path) -> None:
    steps = [record for record in read_records(recipe / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["discriminator_loss"] == 0 for record in steps] == [True] * 6 + [False] * 14


class Thumbnails(nn.Module):
    """Features of images: themselves, small."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 5).flatten(1)


def thumbnails(weights: Path | None) -> nn.Module:
    return Thumbnails()


class TestPriors:
    """Of the same loop as VAEs."""

    @pytest.mark.parametrize("options", [(*FIELD, "epochs=10"), (*FLOW, "epochs=30")], ids=["flow_matching", "flow"])
    def test_stopped_by_a_signal_it_goes_on_to_the_same_file(
        self, recipe: Path, trained: Path, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        name = options[0].removeprefix("name=")
        whole, stopped = (
            copy_of(recipe if name == "flow_matching" else trained, tmp_path / part) for part in ("whole", "stopped")
        )
        told = cxr_vae("prior", whole, *options, *PRIOR)
        assert told.returncode == 0, told.stderr
        folder = trainings(whole, name)[0].name
        call = ["prior", stopped, *options, *PRIOR]
        code = end_after(call, stopped, stopped / "priors" / folder / "metrics.jsonl", 9, signal.SIGTERM)
        assert code == STOPPED_EXIT_CODE
        assert not RunDir(stopped).prior(name).exists()
        result = cxr_vae(*call)
        assert "going on from step-" in result.stdout, result.stderr
        assert RunDir(stopped).prior(name).read_bytes() == RunDir(whole).prior(name).read_bytes()
        metrics = [run / "priors" / folder / "metrics.jsonl" for run in (stopped, whole)]
        assert metrics[0].read_bytes() == metrics[1].read_bytes()

        if name == "flow_matching":  # what is asked for once more doesn't depend on which it is
            return
        assert "already fitted so" in cxr_vae(*call).stdout
        other = cxr_vae("prior", stopped, *options, *PRIOR, "prior.lr=0.002")
        assert "starting" in other.stdout
        assert len(trainings(stopped, name)) == 2
        before = RunDir(whole).prior(name).read_bytes()
        assert RunDir(stopped).prior(name).read_bytes() != before
        again = cxr_vae(*call)  # asked for once more: its training is still there
        assert "going on from step-" in again.stdout
        assert RunDir(stopped).prior(name).read_bytes() == before

    def test_two_processes_train_the_same(self, recipe: Path, tmp_path: Path) -> None:
        losses = {}
        for ranks in (1, 2):
            run = copy_of(recipe, tmp_path / str(ranks))
            call = ("prior", run, *FIELD, *PRIOR, "prior.epochs=3")
            result = cxr_vae(*call, ranks=ranks)
            assert result.returncode == 0, result.stderr
            records = read_records(trainings(run, "flow_matching")[0] / "metrics.jsonl")
            losses[ranks] = [record["loss"] for record in records if record["kind"] == "step"] + [
                record["test"]["loss"] for record in records if record["kind"] == "epoch"
            ]
        assert len(losses[1]) == 15 + 3
        assert losses[2] == pytest.approx(losses[1], rel=1e-4)

        model, config = load_vae(RunDir(run).weights)
        config = override_config(config, FIELD, ("prior",))
        sampler = open_sampler(RunDir(run), model, config, HERE.device)
        images = sampler.draw(64, 128, HERE.device)
        sampler.draw(0, 64, HERE.device)
        assert torch.equal(sampler.draw(64, 70, HERE.device), images[:6])
        assert images.float().std() > 0

    def test_mistakes(self, recipe: Path, trained: Path, shards: Path, source: Path, tmp_path: Path) -> None:
        check_sentence(cxr_vae("prior", recipe, "name=flow"), "is for latent vectors", "use prior.name=flow_matching")
        check_sentence(cxr_vae("prior", recipe, "name=gmm"), "is for latent vectors", "use prior.name=flow_matching")
        check_sentence(cxr_vae("prior", trained, "name=flow_matching"), "is for spatial latents", "gmm or flow")
        check_sentence(cxr_vae("prior", recipe, "prior.class_conditional=false"), "decoder is told the class")
        options = train(shards, tmp_path / "run")
        check_sentence(cxr_vae(*options, "num_classes=3"), "model.num_classes=3", "has 2 classes (NORMAL, PNEUMONIA)")
        refused = cxr_vae(*options, "precision=fp16", "device=auto")
        check_sentence(refused, "train.precision=fp16 should be bf16 or fp32 with objective.adversarial_weight")
        assert not (tmp_path / "run").exists()

        shutil.copytree(source, tmp_path / "source")
        for split in (tmp_path / "source").iterdir():
            shutil.copytree(split / "NORMAL", split / "THIRD")
        three = tmp_path / "three"
        assert cxr_vae("shard", tmp_path / "source", three, "--image-size", 32).returncode == 0
        run = copy_of(recipe, tmp_path)
        for call in (
            ("evaluate", run, "features=random", "num_real=8", "num_generated=8"),
            ("prior", run, "name=standard"),
            ("prior", run, *FIELD),
        ):
            refused = cxr_vae(*call, f"data.shards={three}")
            check_sentence(refused, "model.num_classes=2", "has 3 classes (NORMAL, PNEUMONIA, THIRD)")
        for split in (tmp_path / "source").iterdir():
            shutil.rmtree(split / "NORMAL")
        others = tmp_path / "others"
        assert cxr_vae("shard", tmp_path / "source", others, "--image-size", 32).returncode == 0
        refused = cxr_vae("prior", run, *FIELD, f"data.shards={others}")
        check_sentence(refused, "was trained to be told NORMAL, PNEUMONIA", "others has PNEUMONIA, THIRD")


def trainings(run: Path, name: str) -> list[Path]:
    return sorted(path for path in (run / "priors").iterdir() if path.is_dir() and path.name.startswith(f"{name}-"))


def test_the_class_reaches_losses_grids_and_bounds(recipe: Path, tmp_path: Path) -> None:
    """Each against the network called by hand, with the right class and with the wrong one."""
    model, _ = load_vae(recipe / "vae_final.safetensors")
    config = RunDir(recipe).saved_config()
    index = open_split(config.data, "test")
    dataset = open_dataset(config.data, index, HERE)
    labels = torch.from_numpy(index.labels.astype("int64"))
    assert labels.bincount().tolist() == [8, 10]
    images = to_float(dataset.images(range(18)), HERE.device)
    noise = normal(config.seed, "test", 0, 18, model.latent_shape)
    with torch.inference_mode():
        mean, logvar = model.encode(images)
        latents = mean + (logvar / 2).exp() * noise
        right, wrong = (model.nll(latents, images, told).double() for told in (labels, 1 - labels))
        kl = kl_to_standard_normal(mean, logvar).double().mean()
    assert abs(float(right.mean() - wrong.mean())) > 1e-3

    losses = losses_of_split(model, dataset, config, HERE)
    assert float(losses.reconstruction) == pytest.approx(float(right.mean()), rel=1e-6)
    tested = read_epochs(RunDir(recipe))[-1]["test"]
    assert tested["reconstruction_nats"] == pytest.approx(float(right.mean()), rel=1e-6)
    assert tested["kl_nats"] == pytest.approx(float(kl), rel=1e-5)

    _, found = measure(model, images, labels, 0, config.seed, 1)
    torch.testing.assert_close(found["reconstruction_nats"], right, rtol=1e-5, atol=1e-3)
    with torch.inference_mode():
        importance = normal(config.seed, "importance", 0, 18, model.latent_shape)
        nll = model.nll(mean + (logvar / 2).exp() * importance, images, labels).double()
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(mean + (logvar / 2).exp() * importance)
        posterior = torch.distributions.Normal(0.0, 1.0).log_prob(importance) - logvar / 2
        bound = nll - (prior - posterior).double().flatten(1).sum(1)
    torch.testing.assert_close(found["importance_bound_nats"], bound, rtol=1e-5, atol=1e-2)

    told = []
    decode = model.decode
    model.decode = lambda latents, labels=None: told.append(labels) or decode(latents, labels)
    run = RunDir(tmp_path)
    for kind in ("samples", "reconstructions"):
        (tmp_path / kind).mkdir()
    draw_grids(run, 1, model, dataset, config, HERE.device)()
    assert [of.tolist() for of in told] == [[0, 1] * 32, labels[:16].tolist()]
    assert run.grid("samples", 1).stat().st_size > 0


def test_evaluation_audit_and_report_of_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recipe, run)
    network = "features=tests.test_recipe:thumbnails"  # Inception would take most of the time
    options = (network, "num_generated=70", "num_real=18", "is_splits=2", "importance_samples=2")
    for call in (("evaluate", run, *options), ("audit", run, network, "num_generated=70"), ("report", run)):
        result = cxr_vae(*call)
        assert result.returncode == 0, result.stderr
    assert "70 generated images (prior: standard (temperature 1.0)) against 18 real ones" in result.stdout
    results = json.loads(RunDir(run).results.read_text())
    assert results["generated"]["prior"] == "standard"
    figures = [*results["figures"].values(), results["likelihood"]["importance_bound_nats"]]
    assert all(torch.tensor(figure["value"]).isfinite() for figure in figures)
    tested = read_epochs(RunDir(run))[-1]["test"]["reconstruction_nats"]
    assert results["likelihood"]["reconstruction_nats"]["value"] == pytest.approx(tested, rel=1e-5)
    assert results["latent"]["num_units"] == 2 * 8 * 8
    assert {path.name for path in (run / "evaluation" / "pictures").iterdir()} == {
        *("interpolations.png", "traversals.png")
    }
    record = json.loads((run / "evaluation" / "memorisation.json").read_text())
    assert record["samples"]["prior"] == "standard"
    assert os.fspath(run / "evaluation" / "generated") == record["samples"]["folder"]
    page = read_page(run / "report.html")
    assert "standard (temperature 1.0)" in text_of(section(page, "figures"))


def test_a_decoder_that_is_told_draws_each_class_otherwise(recipe: Path, tmp_path: Path) -> None:
    drawn = {}
    for label in ("NORMAL", "PNEUMONIA"):
        call = ("generate", recipe, "--num", 4, "--label", label, "--out", tmp_path / label)
        assert cxr_vae(*call).returncode == 0
        drawn[label] = [path.read_bytes() for path in sorted((tmp_path / label).glob("*.png"))]
    assert len(drawn["NORMAL"]) == 4
    assert not set(drawn["NORMAL"]) & set(drawn["PNEUMONIA"])
