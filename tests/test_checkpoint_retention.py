"""Which checkpoints stay."""

from pathlib import Path
from typing import Any

import pytest

from cxr_vae.checkpoints import saving as checkpoint
from cxr_vae.checkpoints.manifest import name_of
from cxr_vae.checkpoints.saving import best_of
from cxr_vae.errors import UserError
from tests.checkpoint_helpers import advance, checkpoints, flip, new_state, save, steps_in


def test_the_newest(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(5):
        save(tmp_path, advance(state), "keep=2", "checkpoint.best=false", test_loss=float(state.step))
    (tmp_path / "step-0000000009.tmp").mkdir()
    assert steps_in(tmp_path) == [5, 4]
    assert checkpoints(tmp_path).load_latest(new_state())[0] == "step-0000000005"
    assert steps_in(tmp_path) == [5, 4]
    assert not (tmp_path / "step-0000000009.tmp").exists()  # what a kill left is cleared away


def test_those_at_multiples(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(10):
        save(tmp_path, advance(state), "keep=1", "checkpoint.every_steps=1", "keep_every=4")
    assert steps_in(tmp_path) == [10, 8, 4]


def test_the_best_by_test_loss(tmp_path: Path) -> None:
    state = new_state()
    for loss in (9.0, 5.0, 7.0, None, 6.0):
        save(tmp_path, advance(state), "keep=1", test_loss=loss)
    assert steps_in(tmp_path) == [5, 2]
    assert best_of(tmp_path) == tmp_path / name_of(2)


def test_a_test_loss_that_is_no_number_is_no_best(tmp_path: Path) -> None:
    state = new_state()
    for loss in (5.0, 9.0, float("nan")):
        save(tmp_path, advance(state), "keep=1", test_loss=loss)
    assert steps_in(tmp_path) == [3, 1]


def test_one_that_cannot_be_removed_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(13, "Permission denied", "step-0000000001")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    state = new_state()
    for _ in range(2):
        save(tmp_path, advance(state), "keep=1")
    assert steps_in(tmp_path) == [2, 1]
    assert "step-0000000001: an older checkpoint can't be removed (Permission denied)" in capsys.readouterr().out


def test_nothing_is_removed_for_one_that_does_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state()
    for _ in range(2):
        save(tmp_path, advance(state), "keep=2")
    write_manifest = checkpoint.write_manifest

    def on_a_bad_disk(directory: Path, *arguments: Any) -> None:
        write_manifest(directory, *arguments)
        flip(next(directory.glob("*.safetensors")))

    monkeypatch.setattr(checkpoint, "write_manifest", on_a_bad_disk)
    with pytest.raises(UserError, match=r"doesn't read back from the disk: shard-.* is damaged"):
        save(tmp_path, advance(state), "keep=1")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [name_of(1), name_of(2)]
