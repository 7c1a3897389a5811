import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cxr_vae.config import DataConfig
from cxr_vae.data import reader
from cxr_vae.data.dataset import (
    XrayDataset,
    choose_place,
    free_memory,
    num_bytes,
    open_dataset,
    open_split,
    read_ahead,
    read_in_order,
)
from cxr_vae.data.images import decode_grey, to_square
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.reader import ShardReader
from cxr_vae.data.shards import write_shards
from cxr_vae.data.stream import TrainingStream
from cxr_vae.data.tars import Preprocessing
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from tests.ranks import on_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_are_the_preprocessed_originals(source: Path, shards: Path, in_memory: bool) -> None:
    index = ShardDirectory.open(shards).split("train")
    dataset = XrayDataset(index, in_memory=in_memory, workers=2)
    images = dataset.images(range(len(dataset)))
    assert images.shape == (70, 1, 32, 32)
    assert images.dtype == torch.uint8
    for image, name in zip(images, index.texts("source"), strict=True):
        assert np.array_equal(image[0], to_square(decode_grey((source / name).read_bytes()), 32, "stretch"))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_are_the_same_for_any_loading_and_workers(shards: Path, in_memory: bool, workers: int) -> None:
    index = ShardDirectory.open(shards).split("train")
    stream = TrainingStream(len(index), seed=1)
    slices = [stream.rows(start, start + 9) for start in range(0, 180, 9)]
    plain = XrayDataset(index, in_memory=True, workers=1)
    dataset = XrayDataset(index, in_memory=in_memory, workers=workers)
    with read_ahead(dataset, iter(slices)) as batches:
        read = list(batches)
    assert len(read) == len(slices)
    assert all(torch.equal(batch, plain.images(rows)) for batch, rows in zip(read, slices, strict=True))


@pytest.mark.parametrize(("first", "last"), [(0, 70), (3, 40), (64, 70), (70, 70)])
def test_rows_are_read_in_order_and_once(shards: Path, first: int, last: int) -> None:
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=False, workers=3)
    with read_in_order(dataset, first, last, 16) as batches:
        read = list(batches)
    assert [row for rows, _ in read for row in rows] == list(range(first, last))
    for rows, images in read:
        assert torch.equal(images, dataset.images(rows))


def test_reading_ahead_is_bounded_and_can_be_broken_off(shards: Path) -> None:
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=False, workers=2)
    asked = 0

    def slices():
        nonlocal asked
        while True:
            asked += 1
            yield np.arange(8)

    with read_ahead(dataset, slices(), depth=4) as batches:
        for _ in range(3):
            next(batches)
    assert asked <= 3 + 4


@pytest.mark.parametrize("in_memory", [True, False])
def test_whole_batches_are_pinned_for_a_gpu(shards: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a pinned tensor is none itself. Pinning needs a GPU: only that it is asked for is tested."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda batch: pinned.append(batch) or batch)
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=in_memory, workers=2)
    with read_ahead(dataset, iter([np.arange(9)] * 8), pin=True) as batches:
        read = list(batches)
    assert len(read) == len(pinned) == 8
    assert all(batch is other for batch, other in zip(read, pinned, strict=True))


@pytest.mark.parametrize("format", ["png", "raw", "jpg"])
def test_every_format_is_read(source: Path, shards: Path, tmp_path: Path, format: str) -> None:
    directory = write_shards(source, tmp_path / "out", Preprocessing(32, "stretch", format), workers=2)
    images = XrayDataset(directory.split("train"), in_memory=False, workers=1).images(range(70)).int()
    lossless = (
        XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=1).images(range(70)).int()
    )
    assert (images - lossless).abs().max() <= (8 if format == "jpg" else 0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_flipped_bit_is_noticed_and_named(shards: Path, tmp_path: Path, in_memory: bool) -> None:
    out = shutil.copytree(shards, tmp_path / "copy")
    index = ShardDirectory.open(out).split("train")
    tar = index.shards[index.numbers("shard")[33]]
    content = bytearray(tar.read_bytes())
    content[index.numbers("offset")[33] + index.numbers("size")[33] // 2] ^= 16
    tar.write_bytes(content)
    with pytest.raises(UserError, match=f"{tar.name} is damaged at byte {index.numbers('offset')[33]}"):
        XrayDataset(ShardDirectory.open(out).split("train"), in_memory=in_memory, workers=2).images([33])


def test_a_tar_that_vanishes_is_named(shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "copy")
    dataset = XrayDataset(ShardDirectory.open(out).split("train"), in_memory=False, workers=1)
    shutil.rmtree(out)
    with pytest.raises(UserError, match=r"train-\d+\.tar can't be read"):
        dataset.images([0])


def test_open_dataset_checks_the_size_and_chooses_the_loading(shards: Path) -> None:
    def opened(**options: object) -> XrayDataset:
        config = DataConfig.model_validate({"shards": str(shards), "image_size": 32, **options})
        return open_dataset(config, open_split(config, "train"), ALONE)

    assert opened().place == opened(loading="memory").place == "memory"
    assert opened(loading="shards").place == "shards"
    with pytest.raises(UserError, match="this run is on the CPU"):
        opened(loading="gpu")
    with pytest.raises(UserError, match=r"made with image_size=32, but data.image_size is 64"):
        open_split(DataConfig(shards=str(shards), image_size=64), "train")
    with pytest.raises(UserError, match="no such shard directory"):
        open_split(DataConfig(shards="/nowhere", image_size=32), "train")


def test_what_does_not_fit_is_read_from_the_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(shards=str(shards), image_size=32)
    index = open_split(config, "train")
    monkeypatch.setattr("cxr_vae.data.dataset.free_memory", lambda: 2 * num_bytes(index))
    assert open_dataset(config, index, ALONE).place == "memory"
    monkeypatch.setattr("cxr_vae.data.dataset.free_memory", lambda: 2 * num_bytes(index) - 1)
    assert open_dataset(config, index, ALONE).place == "shards"
    assert open_dataset(config.model_copy(update={"loading": "memory"}), index, ALONE).place == "memory"


def test_a_gpu_is_chosen_where_images_fit_it_and_on_their_way_the_memory(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, here = DataConfig(shards=str(shards), image_size=32), World(0, 1, 0, 1, torch.device("cuda", 0))
    index = open_split(config, "train")
    enough, less = 2 * num_bytes(index), 2 * num_bytes(index) - 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for on_gpu, in_memory, place in ((enough, enough, "gpu"), (less, enough, "memory"), (enough, less, "shards")):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=on_gpu: (free, free))
        monkeypatch.setattr("cxr_vae.data.dataset.free_memory", lambda free=in_memory: free)
        assert choose_place(config, index, here) == place


def test_decoding_all_copies_none(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the host would hold every image twice before they go to a GPU."""
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(XrayDataset, "images", lambda *_: pytest.fail("images are gathered"))
        dataset.decode_all(np.arange(70))
    assert dataset.holds(np.arange(70))


def test_free_memory_is_less_than_there_is() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_each_image_is_decoded_once_and_the_batch_asks_for_nothing_more(shards: Path, counted: dict[str, int]) -> None:
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=2)
    stream = TrainingStream(len(dataset), seed=1)
    for epoch in range(3):
        with read_ahead(dataset, iter(np.array_split(stream.permutation(epoch), 5))) as batches:
            assert sum(map(len, batches)) == 70
    assert counted["decode"] == counted["pread"] == 70
    assert counted["open"] == len(dataset.index.shards)


def test_blocks_are_read_once_an_epoch_by_few_large_reads(shards: Path, counted: dict[str, int]) -> None:
    """With the images of a block-shuffled epoch in the order they come; what is read is what is asked for."""
    index = ShardDirectory.open(shards).split("train")
    plain = XrayDataset(index, in_memory=True, workers=1).images(range(70))
    counted.clear()
    dataset = XrayDataset(index, in_memory=False, workers=3, block=8)
    order = TrainingStream(70, seed=1, block=8).permutation(0)
    with read_ahead(dataset, iter(np.array_split(order, 7))) as batches:
        assert torch.equal(torch.cat(list(batches)), plain[torch.from_numpy(order)])
    assert counted["decode"] == 70
    assert counted["open"] == len(index.shards)
    in_blocks = {(row // 8, int(shard)) for row, shard in enumerate(index.numbers("shard"))}
    assert counted["pread"] == len(in_blocks) < 20  # one a block, and one more where it reaches into the next tar


def test_only_so_many_blocks_are_kept(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_vae.data.reader.WINDOW", 2)
    reader = ShardReader(ShardDirectory.open(shards).split("train"), block=4)
    for row in range(70):
        reader.read(row)
        assert len(reader._blocks) <= 4


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a reader opened a tar, read from one and decoded an image."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            if name == "open":
                time.sleep(0.01)  # time for another thread to find the tar closed too
            return function(*arguments)

        return call

    monkeypatch.setattr("cxr_vae.data.reader.decode", counting("decode", reader.decode))
    monkeypatch.setattr("cxr_vae.data.reader.FileIO", counting("open", reader.FileIO))
    monkeypatch.setattr("cxr_vae.data.reader.os.pread", counting("pread", os.pread))
    return counts


@pytest.mark.parametrize("loading", ["memory", "shards"])
def test_ranks_of_a_machine_decode_each_image_once_and_have_the_same(
    shards: Path, tmp_path: Path, loading: str
) -> None:
    seen = on_ranks("loaded", 2, tmp_path, shards, loading)
    images = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=1).images(range(70))
    for rank in seen:
        assert torch.equal(rank["images"], images)
    # Each decodes the half it is asked for; what it is asked for afterwards is there already, if they share it.
    assert [rank["decoded"] for rank in seen] == ([35, 35] if loading == "memory" else [105, 105])


def test_large_images_decode_to_their_size(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "train" / "NORMAL"
    folder.mkdir(parents=True)
    Image.effect_noise((500, 400), 60).save(folder / "a.png")
    directory = write_shards(tmp_path / "source", tmp_path / "out", Preprocessing(224), workers=1)
    assert XrayDataset(directory.split("train"), in_memory=True, workers=1).images([0]).shape == (1, 1, 224, 224)


def test_many_threads_may_read_one_tar(shards: Path) -> None:
    index = ShardDirectory.open(shards).split("train")
    plain = XrayDataset(index, in_memory=True, workers=1).images(range(70))
    for _ in range(20):  # a fresh dataset each time, so that the threads meet while opening the tars
        dataset = XrayDataset(index, in_memory=False, workers=8)
        with read_ahead(dataset, iter([np.arange(70)])) as batches:
            assert torch.equal(next(batches), plain)
