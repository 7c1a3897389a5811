import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cxr_vae.checkpoint import Checkpoints
from cxr_vae.config_file import load_config
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.state import TrainState
from tests.helpers import TINY
from tests.ranks import on_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
IDENTITY = {"index_hashes": {"train": "abc"}}


def checkpoints(folder: Path, keep: int = 3, **identity: object) -> Checkpoints:
    return Checkpoints(folder, ALONE, keep, IDENTITY | identity)


def new_state(*options: str) -> TrainState:
    return TrainState.create(load_config(None, [*TINY, *options]), ALONE.device)


def advance(state: TrainState, steps: int = 1) -> TrainState:
    """Steps with gradients that depend on the step, so that every tensor of the state moves."""
    for _ in range(steps):
        torch.manual_seed(state.step)
        output = state.model(torch.rand(4, 1, 32, 32), torch.randn(4, 4))
        (output.logits.square().mean() + output.mean.square().mean() + output.logvar.square().mean()).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.advance(torch.tensor([1.5, 0.25], dtype=torch.float64), 4)
    return state


def assert_equal(a: TrainState, b: TrainState) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("options", [(), ("ema_decay=0.9", "optimizer.name=adamw", "weight_decay=0.1")])
def test_what_is_saved_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path: Path, options: tuple[str, ...]) -> None:
    state = advance(new_state(*options), 3)
    checkpoints(tmp_path).save(state)
    loaded = new_state(*options, "seed=9")
    name, skipped = checkpoints(tmp_path).load_latest(loaded)
    assert (name, skipped) == ("step-0000000003", [])
    assert (loaded.step, loaded.samples_seen, loaded.epoch_images) == (3, 12, 12)
    assert_equal(loaded, state)
    assert_equal(advance(loaded, 2), advance(state, 2))


def test_scaler_state_comes_back(tmp_path: Path) -> None:
    state, loaded = new_state(), new_state()
    for one in (state, loaded):
        one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        one.scaler.scale(torch.ones(1))
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 7})
    checkpoints(tmp_path).save(state)
    checkpoints(tmp_path).load_latest(loaded)
    assert loaded.scaler.state_dict() == state.scaler.state_dict()


def test_no_checkpoint_leaves_the_state_alone(tmp_path: Path) -> None:
    state, untouched = advance(new_state()), advance(new_state())
    assert checkpoints(tmp_path / "none").load_latest(state) == (None, [])
    assert_equal(state, untouched)


def test_only_the_newest_are_kept_and_unfinished_ones_are_no_checkpoints(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(5):
        checkpoints(tmp_path, keep=2).save(advance(state))
    (tmp_path / "step-0000000009.tmp").mkdir()
    assert checkpoints(tmp_path).names() == ["step-0000000005", "step-0000000004"]
    assert checkpoints(tmp_path).load_latest(new_state())[0] == "step-0000000005"


def test_nothing_published_is_ever_rewritten(tmp_path: Path) -> None:
    state = advance(new_state())
    checkpoints(tmp_path).save(state)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    checkpoints(tmp_path).save(state)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    checkpoints(tmp_path, config="x").save(advance(new_state(), 2))
    folder = tmp_path / "step-0000000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["samples_seen"], manifest["world_size"]) == (2, 8, 1)
    assert (manifest["index_hashes"], manifest["config"]) == ({"train": "abc"}, "x")
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    assert manifest["versions"]["torch"] == torch.__version__


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: flip(folder / "__0_0.distcp"), "__0_0.distcp is damaged"),
    (lambda folder: flip(folder / ".metadata"), ".metadata is damaged"),
    (lambda folder: os.truncate(folder / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes"),
    (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json is missing or damaged"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is not a checkpoint's"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_checkpoint_is_skipped_by_name_for_an_older_one(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    state = advance(new_state(), 1)
    checkpoints(tmp_path).save(state)
    checkpoints(tmp_path).save(advance(advance(new_state(), 1)))
    damage(tmp_path / "step-0000000002")
    loaded = new_state("seed=5")
    name, skipped = checkpoints(tmp_path).load_latest(loaded)
    assert name == "step-0000000001"
    assert len(skipped) == 1
    assert "step-0000000002" in skipped[0]
    assert reason in skipped[0]
    assert_equal(loaded, state)


def test_damaged_checkpoints_dont_stand_in_the_way_of_new_ones(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(3):
        checkpoints(tmp_path, keep=3).save(advance(state))
    for step in (2, 3):
        flip(tmp_path / f"step-{step:010d}" / "__0_0.distcp")
    loaded = new_state()
    assert checkpoints(tmp_path, keep=1).load_latest(loaded)[0] == "step-0000000001"
    checkpoints(tmp_path, keep=1).save(advance(loaded))  # step 2 again
    again = new_state()
    assert checkpoints(tmp_path, keep=1).load_latest(again) == ("step-0000000002", [])
    assert_equal(again, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-0000000002", "step-0000000002.damaged", "step-0000000003.damaged")
    ]


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(advance(new_state()))
    with pytest.raises(UserError, match="trained on other images"):
        checkpoints(tmp_path, index_hashes={"train": "other"}).load_latest(new_state())


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small tmpfs")
@pytest.mark.parametrize("room", ["in the first file", "before the manifest"])
def test_a_full_disk_is_told_and_leaves_earlier_checkpoints_whole(tmp_path: Path, room: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    try:
        state = advance(new_state())
        checkpoints(small).save(state)
        pages = [-(-path.stat().st_size // 4096) for path in (small / "step-0000000001").iterdir()]
        free = 4096 * (sum(pages) - 1 if room == "before the manifest" else 3)
        usage = os.statvfs(small)
        (small / "ballast").write_bytes(bytes(usage.f_bavail * usage.f_bsize - free))
        with pytest.raises(UserError, match=r"can't be written.*No space left.*earlier ones are whole"):
            checkpoints(small).save(advance(advance(new_state())))
        assert [path.name for path in small.iterdir() if path.is_dir()] == ["step-0000000001"]
        loaded = new_state("seed=4")
        assert checkpoints(small).load_latest(loaded)[0] == "step-0000000001"
        assert_equal(loaded, state)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_checkpoint_of_two_ranks_loads_on_one_and_on_three(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two, _ = on_ranks("states", 2, tmp_path / "two", shards, run, "epochs=1", "ema_decay=0.9")
    written = sorted(path.name for path in (run / "checkpoints" / "step-0000000005").glob("*.distcp"))
    assert written == ["__0_0.distcp", "__1_0.distcp"]  # every rank wrote its part
    for ranks in (1, 3):  # the run is finished: its state is loaded, nothing is trained
        for state in on_ranks("states", ranks, tmp_path / str(ranks), shards, run, "epochs=1", "ema_decay=0.9"):
            assert state.keys() == two.keys()
            for name in two:
                assert torch.equal(state[name], two[name]), name
