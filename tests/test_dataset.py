import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_vae.config import DataConfig
from cxr_vae.dataset import XrayDataset, fits_in_memory, open_dataset, open_split, read_ahead
from cxr_vae.errors import UserError
from cxr_vae.images import decode_grey, to_square
from cxr_vae.index import ShardDirectory
from cxr_vae.shards import write_shards
from cxr_vae.stream import TrainingStream
from cxr_vae.tars import Preprocessing


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
        return open_dataset(config, open_split(config, "train"), 1)

    assert opened().in_memory
    assert not opened(loading="shards").in_memory
    with pytest.raises(UserError, match=r"made with image_size=32, but data.image_size is 64"):
        open_split(DataConfig(shards=str(shards), image_size=64), "train")
    with pytest.raises(UserError, match="no such shard directory"):
        open_split(DataConfig(shards="/nowhere", image_size=32), "train")


def test_what_fits_in_memory_counts_every_process(shards: Path) -> None:
    index = ShardDirectory.open(shards).split("train")
    assert fits_in_memory(index, 1)
    assert not fits_in_memory(index, 10**9)


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
