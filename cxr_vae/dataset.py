"""Sharded X-rays as uint8 tensors, by row of the index: kept in memory, or read from the tars when asked for."""

import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image
from torch import Tensor

from cxr_vae.config import DataConfig
from cxr_vae.errors import UserError
from cxr_vae.index import RESHARD, ShardDirectory, SplitIndex
from cxr_vae.splits import read_split_file
from cxr_vae.workers import num_cores

MEMORY_SHARE = 0.5
"""Of the memory that is free on the machine: `loading=auto` keeps the images there if all ranks together need less."""

OPEN_TARS = 256
"""Open at a time in a process, well below the usual limit of 1024 files."""


class XrayDataset:
    """The images of one split, (N, 1, S, S) uint8, fetched by row numbers.

    `in_memory` decodes all of them once; otherwise each is read from its tar, checked against its CRC-32 and decoded
    at each use. Threads do both: reading and decoding run outside Python's lock, and there is no process to fork.
    """

    def __init__(self, index: SplitIndex, *, in_memory: bool, workers: int) -> None:
        self.index = index
        self.in_memory = in_memory
        self.workers = workers
        self._shard, self._offset = index.numbers("shard"), index.numbers("offset")
        self._size, self._crc32 = index.numbers("size"), index.numbers("crc32")
        self._open_tar = lru_cache(maxsize=OPEN_TARS)(self._open)
        self._images = self._read_all() if in_memory else None

    def __len__(self) -> int:
        return len(self.index)

    def images(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """(n, 1, S, S) uint8 images at these rows of the index."""
        if self._images is not None:
            return self._images.index_select(0, torch.as_tensor(np.asarray(rows, np.int64)))
        out = torch.empty(len(rows), 1, self.index.image_size, self.index.image_size, dtype=torch.uint8)
        for place, row in enumerate(rows):
            out[place, 0] = self._read(int(row))
        return out

    def _read_all(self) -> Tensor:
        """All images, in parallel, each tar from front to back."""
        count, side = len(self.index), self.index.image_size
        images = torch.empty(count, 1, side, side, dtype=torch.uint8)

        def fill(part: npt.NDArray[np.int64]) -> None:
            for row in part:
                images[row, 0] = self._read(int(row))

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(fill, np.array_split(np.arange(count), self.workers)))
        return images

    def _read(self, row: int) -> Tensor:
        """(S, S) uint8 of one image, from its tar."""
        shard = int(self._shard[row])
        path = self.index.shards[shard]
        try:
            tar = self._open_tar(shard)  # held until it was read, whatever the cache does meanwhile
            content = os.pread(tar.fileno(), int(self._size[row]), int(self._offset[row]))
        except OSError as error:
            raise UserError(
                f"{path} can't be read ({error.strerror}): mend that and run the same command again"
            ) from None
        if zlib.crc32(content) != self._crc32[row]:
            raise UserError(f"{path} is damaged at byte {self._offset[row]} (wrong CRC-32): {RESHARD}")
        return torch.from_numpy(decode(content, self.index.format).copy())

    def _open(self, shard: int) -> FileIO:
        # Closed when the cache lets go of it.
        return FileIO(self.index.shards[shard])


def decode(content: bytes, format: str) -> npt.NDArray[np.uint8]:
    """(S, S) uint8 of one stored image."""
    if format == "raw":
        stored: npt.NDArray[np.uint8] = np.load(io.BytesIO(content), allow_pickle=False)
        return stored
    return np.asarray(Image.open(io.BytesIO(content)))


def fits_in_memory(index: SplitIndex, num_processes: int) -> bool:
    """Whether `num_processes` copies of the decoded split leave the machine enough memory."""
    needed = len(index) * index.image_size**2 * num_processes
    return bool(needed <= MEMORY_SHARE * psutil.virtual_memory().available)


@contextmanager
def read_ahead(
    dataset: XrayDataset, slices: Iterator[npt.NDArray[np.int64]], depth: int = 4
) -> Iterator[Iterator[Tensor]]:
    """The images of one slice of rows after another, with the next `depth` being read meanwhile.

    From memory there is nothing to read ahead.
    """
    if dataset.in_memory:
        yield map(dataset.images, slices)
        return
    pool = ThreadPoolExecutor(dataset.workers)
    try:
        yield _in_order(pool, dataset, slices, depth)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, dataset: XrayDataset, slices: Iterator[npt.NDArray[np.int64]], depth: int
) -> Iterator[Tensor]:
    waiting: list[list[Future[Tensor]]] = []
    for rows in slices:
        # A slice is read by several threads, so that a small number of large slices keeps them all busy.
        waiting.append(
            [pool.submit(dataset.images, part) for part in np.array_split(rows, dataset.workers) if len(part)]
        )
        if len(waiting) > depth:
            yield torch.cat([part.result() for part in waiting.pop(0)])
    for parts in waiting:
        yield torch.cat([part.result() for part in parts])


def open_split(config: DataConfig, split: str) -> SplitIndex:
    """The index of a split of `config.shards`; UserError where they were made otherwise than `config` says."""
    index = ShardDirectory.open(Path(config.shards)).split(split)
    for name in ("image_size", "fit", "format"):
        made, said = getattr(index, name), getattr(config, name)
        if made != said:
            raise UserError(
                f"{config.shards} was made with {name}={made}, but data.{name} is {said}: "
                f"set data.{name}={made}, or name another folder of shards"
            )
    if config.split_file is not None and read_split_file(Path(config.split_file)).sha256 != index.split_file_sha256:
        made_by = "another split file" if index.split_file_sha256 else "no split file"
        raise UserError(
            f"{config.shards} was made with {made_by}, not with data.split_file={config.split_file}: shard into "
            "another folder with --split-file, or leave data.split_file out"
        )
    return index


def open_dataset(config: DataConfig, index: SplitIndex, num_processes: int) -> XrayDataset:
    """A split's images, loaded as `config.loading` says by each of a machine's `num_processes`."""
    in_memory = config.loading == "memory" or (config.loading == "auto" and fits_in_memory(index, num_processes))
    workers = config.workers or num_cores(num_processes)
    return XrayDataset(index, in_memory=in_memory, workers=workers)
