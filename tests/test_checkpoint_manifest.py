"""Damage to a checkpoint, of each kind, in each file: found, told, fallen back from; nothing is executed."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_vae.checkpoints import manifest as checkpoint_manifest
from cxr_vae.checkpoints.manifest import find_fault
from tests.checkpoint_helpers import advance, assert_equal, checkpoints, flip, name_of, new_state, save

PART = "shard-00001.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 to 3."""
    folder = tmp_path_factory.mktemp("whole")
    state = new_state()
    for _ in range(3):
        save(folder, advance(state))
    return folder


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def flip_bit(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"bit {seed} of {name}": (lambda folder, n=name, s=seed: flip_bit(folder / n, s), "damaged")
        for name in (PART, "manifest.json", "manifest.json.sha256")
        for seed in range(4)
    },
    "part cut": (lambda folder: os.truncate(folder / PART, 100), f"{PART} has 100 bytes"),
    "part gone": (lambda folder: (folder / PART).unlink(), f"{PART} is missing"),
    "part of an older one": (
        lambda folder: shutil.copy(folder.with_name(name_of(2)) / PART, folder / PART),
        f"{PART} is damaged",
    ),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json or manifest.json.sha256 is"),
    "checksum gone": (lambda folder: (folder / "manifest.json.sha256").unlink(), "is missing"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json is damaged"),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 300), "manifest.json is damaged"),
    "manifest of an older one": (
        lambda folder: shutil.copy(folder.with_name(name_of(2)) / "manifest.json", folder / "manifest.json"),
        "manifest.json is damaged",
    ),
    "one part too many": (
        lambda folder: shutil.copy(folder / PART, folder / "shard-00002.safetensors"),
        "shard-00002.safetensors is not in its manifest.json",
    ),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name_for_an_older_one(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoints")
    damage, reason = DAMAGES[kind]
    damage(folder / name_of(3))
    loaded = new_state("seed=5")
    name, skipped = checkpoints(folder).load_latest(loaded)
    assert name == name_of(2)
    assert len(skipped) == 1
    assert name_of(3) in skipped[0]
    assert reason in skipped[0]
    assert_equal(loaded, advance(new_state(), 2))


@pytest.mark.parametrize("name", [".metadata", PART, "manifest.json"])
def test_nothing_in_a_checkpoint_is_executed(whole: Path, tmp_path: Path, name: str) -> None:
    """torch.distributed.checkpoint's own format would unpickle .metadata."""
    folder = shutil.copytree(whole, tmp_path / "checkpoints")
    (folder / name_of(3) / name).write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    loaded, _ = checkpoints(folder).load_latest(new_state())
    assert loaded == name_of(3 if name == ".metadata" else 2)
    assert not (tmp_path / "executed").exists()


def test_a_bad_sector_is_damage(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoints")
    read = checkpoint_manifest.sha256_of

    def failing(path: Path) -> str:
        if path == folder / name_of(3) / PART:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint_manifest, "sha256_of", failing)
    name, skipped = checkpoints(folder).load_latest(new_state())
    assert name == name_of(2)
    assert f"{PART} can't be read (Input/output error)" in skipped[0]


def test_without_every_byte_only_names_and_sizes_are_looked_at(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoints") / name_of(3)
    flip(folder / PART)
    assert find_fault(folder, every_byte=False) is None
    assert find_fault(folder) == f"{PART} is damaged (its SHA-256 is not the manifest's)"
    os.truncate(folder / PART, 10)
    assert "has 10 bytes" in (find_fault(folder, every_byte=False) or "")
