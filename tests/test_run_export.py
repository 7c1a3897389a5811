import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxr_vae.checkpoints.manifest import published
from cxr_vae.checkpoints.parts import read_tensors
from cxr_vae.checkpoints.saving import best_of
from cxr_vae.models import build_model
from cxr_vae.weights import load_vae
from tests.helpers import check_sentence, cxr_vae
from tests.test_train import arguments


@pytest.fixture(scope="module")
def averaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights, whose third epoch is its worst."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    options = ("ema_decay=0.5", "epochs=3", "keep=9", "checkpoint.every_steps=4")
    assert cxr_vae(*arguments(shards, run, *options)).returncode == 0
    return run


def test_export_of_the_last_checkpoint_is_the_final_weights(averaged: Path, tmp_path: Path) -> None:
    result = cxr_vae("export", averaged, "--out", tmp_path / "a.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'a.safetensors'}\n"
    assert (tmp_path / "a.safetensors").read_bytes() == (averaged / "vae_final.safetensors").read_bytes()


def test_export_of_one_by_name_or_of_the_best(averaged: Path, tmp_path: Path) -> None:
    run = shutil.copytree(averaged, tmp_path / "run")
    result = cxr_vae("export", run, "--checkpoint", "step-0000000004")
    assert result.stdout == f"{run / 'vae_step-0000000004.safetensors'}\n"
    vae, config = load_vae(run / "vae_step-0000000004.safetensors")
    tensors = {f"ema.{name}": torch.empty_like(value) for name, value in vae.state_dict().items()}
    read_tensors(run / "checkpoints" / "step-0000000004", tensors)
    for name, value in build_model(config).state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensors[f"ema.{name}"]), name
        if name == "to_mean.weight":
            assert not torch.equal(vae.state_dict()[name], value)  # trained
    latest = {f"model.{name}": torch.empty_like(value) for name, value in vae.state_dict().items()}
    read_tensors(run / "checkpoints" / "step-0000000004", latest)
    assert not torch.equal(latest["model.to_mean.weight"], tensors["ema.to_mean.weight"])  # it is the average
    best = best_of(run / "checkpoints")
    assert best is not None
    assert cxr_vae("export", run, "--checkpoint", "best").stdout == f"{run / f'vae_{best.name}.safetensors'}\n"


def test_the_decoder_as_a_program_gives_the_same_images(averaged: Path, tmp_path: Path) -> None:
    result = cxr_vae("export", averaged, "--out", tmp_path / "w.safetensors", "--decoder", tmp_path / "d.pt2")
    assert result.returncode == 0, result.stderr
    vae, _ = load_vae(tmp_path / "w.safetensors")
    decode = torch.export.load(tmp_path / "d.pt2").module()
    for batch in (1, 2, 7):
        latents = torch.randn(batch, 4)
        torch.testing.assert_close(decode(latents), vae.decode(latents).sigmoid())


def test_the_decoder_of_a_model_that_is_told_the_class_takes_classes(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cxr_vae(*arguments(shards, run, "epochs=1", "model.num_classes=2")).returncode == 0
    result = cxr_vae("export", run, "--decoder", tmp_path / "d.pt2")
    assert result.returncode == 0, result.stderr
    vae, _ = load_vae(run / "vae_final.safetensors")
    decode = torch.export.load(tmp_path / "d.pt2").module()
    for batch in (1, 5):
        latents, labels = torch.randn(batch, 4), torch.arange(batch) % 2
        torch.testing.assert_close(decode(latents, labels), vae.image(latents, labels))


def test_checkpoints_are_listed_with_their_verdict(averaged: Path, tmp_path: Path) -> None:
    run = shutil.copytree(averaged, tmp_path / "run")
    newest = published(run / "checkpoints")[0]
    listed = cxr_vae("checkpoints", run, "--verify")
    assert listed.returncode == 0
    rows = listed.stdout.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [path.name for path in published(run / "checkpoints")]
    assert rows[0].split()[1:2] == ["210"]  # images seen: 15 steps of 14
    assert all("whole" in row for row in rows)
    assert sum("best" in row for row in rows) == 1
    part = next(newest.glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert cxr_vae("checkpoints", run).returncode == 0  # names and sizes are right
    verified = cxr_vae("checkpoints", run, "--verify")
    assert verified.returncode == 1
    assert f"{part.name} is damaged" in verified.stdout.splitlines()[2]
    check_sentence(cxr_vae("export", run), f"{newest} can't be used", "name another with --checkpoint")
    os.truncate(part, 10)
    assert cxr_vae("checkpoints", run).returncode == 1


def test_mistakes(averaged: Path, shards: Path, tmp_path: Path) -> None:
    check_sentence(cxr_vae("export", averaged, "--checkpoint", "step-7"), "has no checkpoint step-7; it has step-")
    check_sentence(cxr_vae("export", shards), "is not a run directory")
    check_sentence(cxr_vae("checkpoints", shards), "is not a run directory")
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(averaged / "config.yaml", empty)
    check_sentence(cxr_vae("export", empty), "has no checkpoint yet")
    assert "has no checkpoint yet" in cxr_vae("checkpoints", empty).stdout


def test_exported_weights_hold_no_averaging(averaged: Path, tmp_path: Path) -> None:
    cxr_vae("export", averaged, "--out", tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(load_vae(tmp_path / "a.safetensors")[0].state_dict())
