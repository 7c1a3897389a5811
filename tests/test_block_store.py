from pathlib import Path

import pytest
import torch

from cxr_vae.evaluation.block_store import BlockStore


def block(start: int, num: int = 64) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(start, start + num), "y": torch.ones(num, 3) * start}


def test_blocks_come_back_in_order_whoever_wrote_them(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, {"a": 1})
    for start, num in ((128, 6), (0, 64), (64, 64)):
        store.save(start, block(start, num))
    found = BlockStore(tmp_path, {"a": 1}).load_all(134)
    assert torch.equal(found["x"], torch.arange(134))
    assert torch.equal(store.load_all(100)["x"], torch.arange(100))
    assert store.num_at(128) == 6
    with pytest.raises(RuntimeError, match="missing or damaged"):
        store.load_all(140)


def test_what_was_computed_from_something_else_is_not_found(tmp_path: Path) -> None:
    BlockStore(tmp_path, {"index": "abc", "network": "random"}).save(0, block(0))
    assert BlockStore(tmp_path, {"network": "random", "index": "abc"}).num_at(0) == 64
    assert BlockStore(tmp_path, {"index": "abd", "network": "random"}).num_at(0) == 0


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_is_no_block(tmp_path: Path, place: int) -> None:
    store = BlockStore(tmp_path, {})
    store.save(0, block(0))
    path = next(store.folder.iterdir())
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert store.load(0) is None
    store.save(0, block(0))
    assert store.num_at(0) == 64
