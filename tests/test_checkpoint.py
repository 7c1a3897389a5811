import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cxr_vae.checkpoints import parts
from cxr_vae.checkpoints import saving as checkpoint
from cxr_vae.checkpoints.manifest import name_of, published
from cxr_vae.checkpoints.parts import read_tensors
from cxr_vae.errors import UserError
from tests.checkpoint_helpers import (
    advance,
    assert_equal,
    assert_equal_tensors,
    checkpoints,
    new_state,
    save,
    skip,
    steps_in,
)
from tests.helpers import HANG_S


@pytest.mark.parametrize("options", [(), ("ema_decay=0.9", "optimizer.name=adamw", "weight_decay=0.1")])
def test_what_is_saved_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path: Path, options: tuple[str, ...]) -> None:
    state = advance(new_state(*options), 3)
    skip(state)
    assert state.is_best(7.25)
    save(tmp_path, state, *options)
    loaded = new_state(*options, "seed=9")
    name, skipped = checkpoints(tmp_path, *options).load_latest(loaded)
    assert (name, skipped) == ("step-0000000004", [])
    assert (loaded.step, loaded.samples_seen, loaded.epoch_sums[2], loaded.num_skipped) == (4, 16, 12, 1)
    assert not loaded.is_best(7.25)
    assert_equal(loaded, state)
    assert_equal(advance(loaded, 2), advance(state, 2))
    for parameter, moments in loaded.optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()


def test_scaler_state_comes_back(tmp_path: Path) -> None:
    state, loaded = new_state(), new_state()
    for one in (state, loaded):
        one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        one.scaler.scale(torch.ones(1))
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 7})
    save(tmp_path, state)
    checkpoints(tmp_path).load_latest(loaded)
    assert loaded.scaler.state_dict() == state.scaler.state_dict()


def test_a_save_before_the_first_update_changes_nothing() -> None:
    """torch's get_optimizer_state_dict makes the moments of a new optimizer by a step, which Adam then counts."""
    one, two = new_state("weight_decay=0.1"), new_state("weight_decay=0.1")
    for state in (one, two):
        skip(state)
    one.state_dict()
    assert_equal(advance(one, 3), advance(two, 3))
    assert one.state_dict()["optimizer.state.to_mean.weight.step"].item() == 3


def test_no_checkpoint_leaves_the_state_alone(tmp_path: Path) -> None:
    state, untouched = advance(new_state()), advance(new_state())
    assert checkpoints(tmp_path / "none").load_latest(state) == (None, [])
    assert_equal(state, untouched)


class TestSavingWhileTrainingGoesOn:
    def test_what_is_written_is_the_state_at_the_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writing, go = threading.Event(), threading.Event()
        write = parts.write_tensors

        def slowly(*arguments: Any) -> Any:
            writing.set()
            assert go.wait(HANG_S)
            return write(*arguments)

        monkeypatch.setattr(parts, "write_tensors", slowly)
        state, saving = advance(new_state()), checkpoints(tmp_path)
        saving.save(state)
        assert writing.wait(HANG_S)
        advance(state, 3)  # save has returned; the write has not begun
        assert published(tmp_path) == []
        go.set()
        saving.wait()
        loaded = new_state("seed=5")
        assert checkpoints(tmp_path).load_latest(loaded)[0] == "step-0000000001"
        assert_equal(loaded, advance(new_state()))

    def test_a_second_save_waits_for_the_first(self, tmp_path: Path) -> None:
        state, saving = new_state(), checkpoints(tmp_path, "keep=9")
        for _ in range(5):
            saving.save(advance(state))
        saving.wait()
        assert steps_in(tmp_path) == [5, 4, 3, 2, 1]
        for step in range(1, 6):
            tensors = new_state().state_dict()
            read_tensors(tmp_path / name_of(step), tensors)
            assert_equal_tensors(tensors, advance(new_state(), step).state_dict())

    def test_a_step_is_saved_once(self, tmp_path: Path) -> None:
        state, saving = advance(new_state()), checkpoints(tmp_path)
        saving.save(state)
        saving.wait()
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
        saving.save(state)
        saving.wait()
        again = checkpoints(tmp_path)
        again.load_latest(state)
        again.save(state)
        again.wait()
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before

    @pytest.mark.parametrize("on_failure", ["stop", "continue"])
    def test_a_failed_write_is_told_at_the_next_save(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_failure: str
    ) -> None:
        refusals = iter([OSError(28, "No space left on device")])

        def sometimes() -> None:
            for refusal in refusals:
                raise refusal

        state, option = advance(new_state()), f"on_failure={on_failure}"
        saving = checkpoints(tmp_path, option, before_publishing=sometimes)
        saving.save(state)  # fails in the thread
        advance(state)
        if on_failure == "stop":
            with pytest.raises(UserError, match=r"step-0000000001: this checkpoint can't be written .*No space left"):
                saving.save(state)
            return
        saving.save(state)
        saving.wait()
        told = capsys.readouterr().out
        assert "warning" in told
        assert "step-0000000001: this checkpoint can't be written" in told
        assert "training goes on" in told
        assert steps_in(tmp_path) == [2]

    def test_the_last_is_tried_even_if_the_one_before_failed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        refusals = iter([OSError(5, "Input/output error")])

        def once() -> None:
            for refusal in refusals:
                raise refusal

        state = advance(new_state())
        saving = checkpoints(tmp_path, "on_failure=stop", before_publishing=once)
        saving.save(state)
        saving.save(advance(state), last=True)
        assert "step-0000000001: this checkpoint can't be written (Input/output error" in capsys.readouterr().out
        assert steps_in(tmp_path) == [2]

    def test_a_failed_last_write_is_an_error_in_any_case(self, tmp_path: Path) -> None:
        def never() -> None:
            raise OSError(28, "No space left on device")

        saving = checkpoints(tmp_path, "on_failure=continue", before_publishing=never)
        saving.save(advance(new_state()))
        with pytest.raises(UserError, match="run the same command again"):
            saving.wait()
        assert list(tmp_path.iterdir()) == []

    def test_where_the_directory_cannot_be_made_training_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "checkpoints"
        folder.symlink_to(tmp_path / "a disk that is gone" / "checkpoints")
        saving = checkpoints(folder, "on_failure=continue")
        state = advance(new_state())
        saving.save(state)
        saving.save(advance(state))
        told = capsys.readouterr().out
        assert f"{folder / name_of(1)}: this checkpoint can't be written" in told
        assert "MB are free there); earlier ones are whole, training goes on" in told
        with pytest.raises(UserError, match="can't be written"):
            saving.wait()

    def test_the_metrics_are_on_the_disk_before_it_is_published(self, tmp_path: Path) -> None:
        seen: list[list[Path]] = []
        saving = checkpoints(tmp_path, before_publishing=lambda: seen.append(published(tmp_path)))
        saving.save(advance(new_state()))
        saving.wait()
        assert seen == [[]]


def test_when_a_checkpoint_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = checkpoints(tmp_path, "checkpoint.every_steps=5", "every_minutes=null")
    assert [step for step in range(1, 16) if by_steps.is_due(step)] == [5, 10, 15]
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    by_clock = checkpoints(tmp_path, "every_minutes=2")
    assert not by_clock.is_due(5)
    now += 119
    assert not by_clock.is_due(5)
    now += 1
    assert by_clock.is_due(5)
    by_clock.save(advance(new_state()))
    assert not by_clock.is_due(6)
    by_clock.wait()


def test_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    folder = save(tmp_path, advance(new_state(), 2), test_loss=3.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["samples_seen"], manifest["world_size"]) == (2, 8, 1)
    assert (manifest["index_hashes"], manifest["test_loss_nats"]) == ({"train": "abc"}, 3.5)
    assert manifest["config"]["model"]["channels"] == [8, 16]
    assert set(manifest["files"]) | {"manifest.json", "manifest.json.sha256"} == {p.name for p in folder.iterdir()}
    assert manifest["versions"]["torch"] == torch.__version__
    subprocess.run(["sha256sum", "--check", "--quiet", "manifest.json.sha256"], cwd=folder, check=True)


def test_a_checkpoint_is_tensors_that_safetensors_reads(tmp_path: Path) -> None:
    state = advance(new_state())
    (part,) = save(tmp_path, state).glob("*.safetensors")
    assert_equal_tensors(load_file(part), state.state_dict())
