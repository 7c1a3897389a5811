"""Checkpoints that are damaged, of something else, of other ranks, or for which there is no room."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cxr_vae.checkpoints.manifest import name_of, published
from cxr_vae.errors import UserError
from tests.checkpoint_helpers import advance, assert_equal, checkpoints, flip, new_state, save
from tests.ranks import on_ranks


def test_damaged_checkpoints_dont_stand_in_the_way_of_new_ones(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(3):
        save(tmp_path, advance(state))
    for step in (2, 3):
        flip(next((tmp_path / name_of(step)).glob("*.safetensors")))
    loaded = new_state()
    assert checkpoints(tmp_path).load_latest(loaded)[0] == "step-0000000001"
    save(tmp_path, advance(loaded), "keep=1")  # step 2 again
    again = new_state()
    assert checkpoints(tmp_path).load_latest(again) == ("step-0000000002", [])
    assert_equal(again, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-0000000002", "step-0000000002.unusable", "step-0000000003.unusable")
    ]


def test_a_checkpoint_of_another_model_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, advance(new_state()))
    other = advance(new_state("model.channels=[8, 24]"), 2)
    save(tmp_path, other, "model.channels=[8, 24]")
    name, skipped = checkpoints(tmp_path).load_latest(new_state())
    assert name == "step-0000000001"
    assert "it is of another configuration (model.channels: [8, 24] → [8, 16])" in skipped[0]


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path) -> None:
    save(tmp_path, advance(new_state()))
    with pytest.raises(UserError, match="trained on other images"):
        checkpoints(tmp_path, train_hash="other").load_latest(new_state())


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small tmpfs")
@pytest.mark.parametrize("room", ["in the first file", "before the manifest"])
def test_a_full_disk_is_told_and_leaves_earlier_checkpoints_whole(tmp_path: Path, room: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    try:
        state = advance(new_state())
        first = save(small, state)
        pages = [-(-path.stat().st_size // 4096) for path in first.iterdir()]
        free = 4096 * (sum(pages) - 2 if room == "before the manifest" else 3)
        usage = os.statvfs(small)
        (small / "ballast").write_bytes(bytes(usage.f_bavail * usage.f_bsize - free))
        with pytest.raises(UserError, match=r"can't be written.*No space left.*earlier ones are whole"):
            save(small, advance(advance(new_state())))
        assert [path.name for path in small.iterdir() if path.is_dir()] == ["step-0000000001"]
        loaded = new_state("seed=4")
        assert checkpoints(small).load_latest(loaded)[0] == "step-0000000001"
        assert_equal(loaded, state)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_part_that_another_rank_cannot_read_back_is_told_by_all(shards: Path, tmp_path: Path) -> None:
    for told in on_ranks("unreadable_part", 2, tmp_path, shards, tmp_path / "run"):
        assert "step-0000000001: this checkpoint can't be written (Input/output error" in told["error"]
    assert published(tmp_path / "run" / "checkpoints") == []


def test_a_checkpoint_of_two_ranks_loads_on_one_and_on_three(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two, _ = on_ranks("states", 2, tmp_path / "two", shards, run, "epochs=1", "ema_decay=0.9")
    written = sorted(path.name for path in (run / "checkpoints" / "step-0000000005").glob("*.safetensors"))
    assert written == ["shard-00001.safetensors", "shard-00002.safetensors"]  # every rank wrote its part
    for ranks in (1, 3):  # the run is finished: its state is loaded, nothing is trained
        for state in on_ranks("states", ranks, tmp_path / str(ranks), shards, run, "epochs=1", "ema_decay=0.9"):
            assert state.keys() == two.keys()
            for name in two:
                assert torch.equal(state[name], two[name]), name
