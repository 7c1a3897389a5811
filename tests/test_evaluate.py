import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.evaluation.image_sets import rows_of
from cxr_vae.evaluation.latent_pictures import save_latent_pictures
from cxr_vae.models import VAE
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_epochs
from tests.helpers import check_sentence, command, cxr_vae, with_patch

OPTIONS = ("features=random", "num_generated=70", "num_real=40", "is_splits=4")


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[Path, str]:
    result = cxr_vae("evaluate", trained, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return trained, result.stdout


def results_of(run: Path) -> dict:
    return json.loads((run / "evaluation" / "evaluation_results.json").read_text())


def test_results_carry_what_a_figure_needs(evaluated: tuple[Path, str], shards: Path) -> None:
    run, output = evaluated
    results = results_of(run)
    names = ("frechet", "frechet_infinity", "kernel", "precision", "recall", "density", "coverage", "score")
    assert list(results["figures"]) == [f"{name}_random" for name in names]  # no FID without Inception
    again = results["reconstructions"]
    assert list(again["figures"]) == [*(f"{name}_random" for name in names[:-1]), "psnr_db", "ssim"]
    assert again["num"] == 18
    for figure in [*results["figures"].values(), *again["figures"].values(), *results["likelihood"].values()]:
        low, high = figure["interval_95"]
        assert low <= figure["value"] <= high
    assert all(np.isfinite(figure["floor"]) for figure in results["figures"].values())
    likelihood = {name: figure["value"] for name, figure in results["likelihood"].items()}
    assert likelihood["importance_bound_nats"] < likelihood["negative_elbo_nats"]
    assert likelihood["reconstruction_nats"] + likelihood["kl_nats"] == pytest.approx(likelihood["negative_elbo_nats"])
    tested = read_epochs(RunDir(run))[-1]["test"]
    assert likelihood["kl_nats"] == pytest.approx(tested["kl_nats"], rel=0.02)  # which trained in bf16
    assert likelihood["reconstruction_nats"] == pytest.approx(tested["reconstruction_nats"], rel=0.02)
    assert results["latent"]["num_units"] == 4
    assert len(results["latent"]["kl_nats_per_unit"]) == 4
    assert results["figures"]["frechet_random"]["value"] > results["figures"]["frechet_random"]["floor"]
    assert (results["num_generated"], results["num_real"], results["num_real_wanted"]) == (70, 18, 40)
    assert results["num_pairs"] == {"generated": 70, "reconstructions": 18, "real": 18, "floor": 70}
    assert "The floor is of" not in output
    manifest = json.loads((shards / "manifest.json").read_text())
    assert results["real"]["split"] == "test"
    assert results["real"]["index_sha256"] == manifest["splits"]["test"]["index"]["sha256"]
    assert results["pixel_likelihood"] == "bernoulli"
    assert results["features"]["network"] == "random"
    assert len(results["features"]["weights_sha256"]) == 64
    assert "the test split has 18 images, not 40: all are used" in output
    assert "is no FID" in " ".join(output.split()) or "are no FID" in output
    assert "FID " not in output.replace("no FID", "")


def test_images_lie_beside_the_figures(evaluated: tuple[Path, str], shards: Path) -> None:
    run, _ = evaluated
    generated, real = (sorted((run / "evaluation" / name).glob("*.png")) for name in ("generated", "real"))
    assert (len(generated), len(real)) == (70, 18)
    dataset = XrayDataset(ShardDirectory.open(shards).split("test"), in_memory=True, workers=1)
    expected = {image.numpy().tobytes() for image in dataset.images(range(18))}
    assert {path.name for path in (run / "evaluation/pictures").iterdir()} == {"interpolations.png", "traversals.png"}
    with Image.open(run / "evaluation/pictures/traversals.png") as picture:
        assert picture.size == (9 * 34 + 2, 4 * 34 + 2)  # a row a latent unit
    assert not (run / "evaluation/features").exists()
    assert {np.asarray(Image.open(path)).tobytes() for path in real} == expected  # every test image once


def test_no_real_image_is_looked_at_twice(shards: Path) -> None:
    index = ShardDirectory.open(shards).split("test")
    assert rows_of(index, 18, Config()).tolist() == list(range(18))
    with pytest.raises(AssertionError, match="19 of 18 images would be repeated"):
        rows_of(index, 19, Config())


class ShowsTheClass(VAE):
    """White for the last class, black for the first."""

    latent_shape = (1,)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images.mean((2, 3))
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        self.check_labels(labels)
        assert labels is not None
        return (100.0 * labels - 50)[:, None, None, None].expand(-1, 1, 4, 4)


def test_latent_pictures_are_of_the_images_own_classes(tmp_path: Path) -> None:
    model = ShowsTheClass(num_classes=2)
    save_latent_pictures(tmp_path, model, torch.rand(4, 1, 4, 4), torch.tensor([1, 0, 1, 0]))
    rows = {}
    for name, height in (("interpolations", 2), ("traversals", 1)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        rows[name] = [[int(pixels[row * 6 + 4, column * 6 + 4]) for column in range(9)] for row in range(height)]
    there, back = [255] * 4 + [0] * 5, [0] * 4 + [255] * 5
    assert rows == {"interpolations": [there, back], "traversals": [[255] * 9]}


def test_two_processes_find_the_same_figures(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = evaluated
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    result = cxr_vae("evaluate", copy, *OPTIONS, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = results_of(run), results_of(copy)
    for name, figure in one["figures"].items():
        assert two["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6, abs=1e-12), name
    for path in (run / "evaluation" / "generated").glob("*.png"):
        assert path.read_bytes() == (copy / "evaluation" / "generated" / path.name).read_bytes()


KILLED_AFTER_ONE_BLOCK = """
import sys
if "cxr_vae" in sys.orig_argv:
    import os, signal
    from cxr_vae.evaluation.block_store import BlockStore
    save = BlockStore.save
    BlockStore.save = lambda *arguments: (save(*arguments), os.kill(os.getpid(), signal.SIGKILL))
"""

NOTES_BLOCKS = """
import sys
if "cxr_vae" in sys.orig_argv:
    import shutil
    from pathlib import Path
    rmtree = shutil.rmtree
    def noted(path, *arguments, **options):
        blocks = [f"{{block}} {{block.stat().st_mtime_ns}}" for block in Path(path).glob("*/*.safetensors")]
        with open({seen!r}, "a") as seen:
            seen.writelines(line + chr(10) for line in blocks)
        rmtree(path, *arguments, **options)
    shutil.rmtree = noted
"""
"""Of what an evaluation throws away at its end: each block of features, and when it was written."""


def test_killed_and_started_again_it_computes_only_what_is_missing(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(evaluated[0], tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    folder, cache = run / "evaluation", tmp_path / "cache"
    call = command("cxr-vae", "evaluate", run, *OPTIONS)
    killed = with_patch(tmp_path, KILLED_AFTER_ONE_BLOCK) | {"CXR_VAE_CACHE": str(cache)}
    assert subprocess.run(call, env=killed, stderr=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    (first,) = folder.glob("features/*/*.safetensors")
    assert not list(cache.rglob("*.safetensors"))
    (folder / "generated/000003.png").unlink()
    noted = first.stat().st_mtime_ns, (folder / "generated/000005.png").stat().st_mtime_ns
    seen = tmp_path / "seen"
    (tmp_path / "library/sitecustomize.py").write_text(NOTES_BLOCKS.format(seen=str(seen)))
    assert subprocess.run(call, env=killed, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert f"{first} {noted[0]}" in seen.read_text().splitlines()
    assert (folder / "generated/000005.png").stat().st_mtime_ns != noted[1]  # its block lacked one
    for name, figure in results_of(evaluated[0])["figures"].items():
        assert results_of(run)["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6, abs=1e-12), name
    assert len(list(cache.rglob("*.safetensors"))) == 3  # a block of test images, two of train


def test_the_same_evaluation_is_not_done_twice(evaluated: tuple[Path, str]) -> None:
    run, _ = evaluated
    before = (run / "evaluation" / "evaluation_results.json").read_bytes()
    again = cxr_vae("evaluate", run, *OPTIONS)
    assert "already evaluated so" in again.stdout
    assert again.stdout.partition("already evaluated so")[2] == evaluated[1][evaluated[1].index("\n\nSamples\n") :]
    assert (run / "evaluation" / "evaluation_results.json").read_bytes() == before


def test_another_evaluation_keeps_the_earlier_figures(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    before = results_of(run)
    assert cxr_vae("evaluate", run, *OPTIONS[:1], "num_generated=8", "num_real=8", "is_splits=2").returncode == 0
    assert results_of(run)["num_generated"] == 8
    assert len(list((run / "evaluation" / "generated").glob("*.png"))) == 8  # none of the earlier 70 is left
    assert json.loads((run / "evaluation" / "evaluation_results.1.json").read_text()) == before


class TestMistakes:
    """One sentence, exit code 2."""

    def test_missing_weights_stop_it_at_the_start_with_two_ways_out(self, trained: Path, tmp_path: Path) -> None:
        result = cxr_vae("evaluate", trained, "num_generated=50", TORCH_HOME=str(tmp_path))
        check_sentence(result, "cxr-vae fetch-weights", "fetch-weights --from FILE", "features=random")

    def test_no_run(self, tmp_path: Path) -> None:
        check_sentence(cxr_vae("evaluate", tmp_path), "is not a run directory")

    def test_an_unfinished_run(self, trained: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(trained, tmp_path / "run")
        (copy / "vae_final.safetensors").unlink()
        check_sentence(cxr_vae("evaluate", copy, *OPTIONS), "vae_final.safetensors is missing")

    def test_an_option_of_the_training(self, trained: Path) -> None:
        check_sentence(cxr_vae("evaluate", trained, "latent_dim=3"), "settled by the training run")

    def test_an_unknown_split(self, trained: Path) -> None:
        check_sentence(cxr_vae("evaluate", trained, *OPTIONS, "real_split=val"), "no split val; it has test, train")

    def test_a_floor_of_the_same_split(self, trained: Path) -> None:
        check_sentence(cxr_vae("evaluate", trained, *OPTIONS, "floor_split=test"), "name two different splits")

    def test_shards_of_another_size(self, trained: Path, source: Path, tmp_path: Path) -> None:
        write_shards(source, tmp_path / "larger", Preprocessing(image_size=64), workers=1)
        result = cxr_vae("evaluate", trained, *OPTIONS, f"data.shards={tmp_path / 'larger'}")
        check_sentence(result, "was made with image_size=64, but data.image_size is 32")

    def test_too_few_images(self, trained: Path) -> None:
        check_sentence(
            cxr_vae("evaluate", trained, "features=random", "num_generated=5"), "is_splits=10 needs at least"
        )

    def test_foreign_files_among_the_images(self, trained: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
        (copy / "evaluation" / "generated").mkdir(parents=True)
        (copy / "evaluation" / "generated" / "mine.png").write_bytes(b"x")
        check_sentence(cxr_vae("evaluate", copy, *OPTIONS), "holds something else (mine.png)")
