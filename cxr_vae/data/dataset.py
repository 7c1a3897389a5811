"""Sharded X-rays as uint8 tensors, by row of the index: kept on the GPU or in memory, or read when asked for."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from cxr_vae.config import Config, DataConfig
from cxr_vae.data.index import ShardDirectory, SplitIndex
from cxr_vae.data.reader import ShardReader
from cxr_vae.data.shared_memory import shared_zeros
from cxr_vae.data.split_file import read_split_file
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.workers import num_cores

MEMORY_SHARE = 0.5
"""Of the memory that is free: `loading=auto` keeps the images there if they need less."""

Rows = npt.NDArray[np.int64]


class ImageSource(Protocol):
    """What a run trains on: images of a split, or tensors in their place, by row of its index."""

    index: SplitIndex
    workers: int
    """Threads that read."""

    def __len__(self) -> int: ...

    @property
    def place(self) -> Literal["gpu", "memory", "shards"]:
        """Where they are."""

    def images(self, rows: Sequence[int] | Rows) -> Tensor:
        """Those at these rows, (n, …)."""

    def holds(self, rows: Rows) -> bool:
        """Whether these are there without being read."""


class XrayDataset:
    """The images of one split, (N, 1, S, S) uint8, fetched by row numbers.

    `in_memory` keeps each image once it has been read and decoded, in `memory` if that is given: (N · (S² + 1),) uint8,
    zeros at first, which several processes may share. Otherwise each is read at each use. Threads do both: reading and
    decoding run outside Python's lock, and there is no process to fork. Rows are read in blocks of `block`.
    """

    def __init__(
        self, index: SplitIndex, *, in_memory: bool, workers: int, block: int = 1, memory: Tensor | None = None
    ) -> None:
        self.index, self.workers = index, workers
        self.device = torch.device("cpu")
        self._reader = ShardReader(index, block)
        self._images: Tensor | None = None
        if in_memory:
            count, side = len(index), index.image_size
            memory = torch.zeros(count * (side**2 + 1), dtype=torch.uint8) if memory is None else memory
            self._images = memory[: count * side**2].view(count, 1, side, side)
            self._here = memory[count * side**2 :].numpy()  # whether each has been decoded

    def __len__(self) -> int:
        return len(self.index)

    @property
    def place(self) -> Literal["gpu", "memory", "shards"]:
        """Where the images are."""
        if self._images is None:
            return "shards"
        return "memory" if self.device.type == "cpu" else "gpu"

    def images(self, rows: Sequence[int] | Rows) -> Tensor:
        """(n, 1, S, S) uint8 images at these rows of the index, on `device`."""
        rows = np.asarray(rows, np.int64)
        if self._images is None:
            images = torch.empty(len(rows), 1, self.index.image_size, self.index.image_size, dtype=torch.uint8)
            for place, row in enumerate(rows):
                images.numpy()[place, 0] = self._reader.read(row)
            return images
        self._decode(rows)
        return self._images.index_select(0, torch.from_numpy(rows).to(self.device, non_blocking=True))

    def _decode(self, rows: Rows) -> None:
        assert self._images is not None
        for row in rows[self._here[rows] == 0]:
            self._images.numpy()[row, 0] = self._reader.read(row)
            self._here[row] = 1

    def labels(self, rows: Sequence[int] | Rows, device: torch.device) -> Tensor:
        """(n,) int64 classes of these rows."""
        labels = self.index.labels[np.asarray(rows, np.int64)].astype(np.int64)
        return torch.from_numpy(labels).to(device, non_blocking=True)

    def holds(self, rows: Rows) -> bool:
        """Whether these images are there without being read."""
        return self._images is not None and bool(self._here[rows].all())

    def decode_all(self, rows: Rows) -> None:
        """Reads what is to be kept of these rows, in parallel."""
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(self._decode, np.array_split(rows, max(self.workers, len(rows) // 64))))

    def move(self, device: torch.device) -> None:
        """Takes the images, all of which have been decoded, to a GPU; `images` then gathers there."""
        assert self._images is not None
        assert self._here.all()
        self._images, self.device = self._images.to(device), device
        self._here = np.ones(len(self), np.uint8)  # lets go of the memory


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as float32 in [0, 1] on `device`; the bytes travel, not the floats."""
    return images.to(device, non_blocking=True) / 255


@contextmanager
def read_ahead(
    dataset: ImageSource, slices: Iterator[Rows], depth: int = 4, *, pin: bool = False
) -> Iterator[Iterator[Tensor]]:
    """The images of one slice of rows after another, with the next `depth` being read meanwhile, if they must be.

    `pin`: those on the CPU are put where a GPU fetches them by itself.
    """
    pool = ThreadPoolExecutor(dataset.workers)
    try:
        batches = _in_order(pool, dataset, slices, depth)
        yield (batch.pin_memory() if pin and batch.device.type == "cpu" else batch for batch in batches)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def read_in_order(dataset: ImageSource, first: int, last: int, size: int) -> Iterator[Iterator[tuple[range, Tensor]]]:
    """The rows first … last - 1 by `size` and their images, read ahead."""
    parts = [range(start, min(start + size, last)) for start in range(first, last, size)]
    with read_ahead(dataset, iter(map(np.asarray, parts))) as batches:
        yield zip(parts, batches, strict=True)


def _in_order(pool: ThreadPoolExecutor, dataset: ImageSource, slices: Iterator[Rows], depth: int) -> Iterator[Tensor]:
    coming: deque[Callable[[], Tensor]] = deque()
    for rows in slices:
        coming.append(_begin(pool, dataset, rows))
        if len(coming) > depth:
            yield coming.popleft()()
    while coming:
        yield coming.popleft()()


def _begin(pool: ThreadPoolExecutor, dataset: ImageSource, rows: Rows) -> Callable[[], Tensor]:
    """Begins to read a slice, unless it is there; what is returned waits for it."""
    if dataset.holds(rows):
        return partial(dataset.images, rows)
    # A slice is read by several threads, so that a small number of large slices keeps them all busy.
    parts = [pool.submit(dataset.images, part) for part in np.array_split(rows, dataset.workers) if len(part)]
    return lambda: torch.cat([part.result() for part in parts])


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


def check_classes(config: Config, index: SplitIndex) -> None:
    """Raises UserError where the decoder is told of another number of classes than there are."""
    if config.model.num_classes not in (0, len(index.classes)):
        raise UserError(
            f"model.num_classes={config.model.num_classes}: {config.data.shards} has {len(index.classes)} classes "
            f"({', '.join(index.classes)}); train with that number, or with 0 for a decoder that isn't told"
        )


def open_dataset(config: DataConfig, index: SplitIndex, here: World) -> XrayDataset:
    """A split's images, kept as `config.loading` says; every rank of a machine calls this, and has the same images.

    On GPUs the ranks of a machine decode a part each before it returns; in memory, images are decoded as they are used.
    """
    place = choose_place(config, index, here)
    workers = config.workers or num_cores(here.local_size)
    if place == "shards":
        return XrayDataset(index, in_memory=False, workers=workers, block=config.shuffle_block)
    memory, number, count = shared_zeros(num_bytes(index), here)
    dataset = XrayDataset(index, in_memory=True, workers=workers, block=config.shuffle_block, memory=memory)
    if place == "gpu":
        dataset.decode_all(np.array_split(np.arange(len(index)), count)[number])
        here.barrier()
        dataset.move(here.device)
    return dataset


def num_bytes(index: SplitIndex) -> int:
    """Of a split's images in memory, with a byte each for whether it is there."""
    return len(index) * (index.image_size**2 + 1)


def choose_place(config: DataConfig, index: SplitIndex, here: World) -> str:
    """`config.loading`, decided where it is auto: the same on every rank."""
    if config.loading == "gpu" and here.device.type == "cpu":
        raise UserError("data.loading=gpu: this run is on the CPU; use data.loading=auto or memory")
    if config.loading != "auto":
        return config.loading
    if not here.all(num_bytes(index) <= MEMORY_SHARE * free_memory()):
        return "shards"  # whatever room a GPU has: images are decoded into memory before they go there
    if here.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(here.device)
        sharing = max(1, here.local_size // torch.cuda.device_count())
        if here.all(num_bytes(index) * sharing <= MEMORY_SHARE * free):
            return "gpu"
    return "memory"


def free_memory() -> int:
    """Bytes that this process and its like may still take: of the machine, or of the job if that has a limit."""
    free = int(psutil.virtual_memory().available)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        group = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
        for folder in (group, *group.parents):  # a limit may be set further up
            limit = folder / "memory.max"
            if limit.is_file() and limit.read_text().strip().isdigit():
                used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, int(limit.read_text()) - int(used["anon"]) - int(used["shmem"]))
    return free
