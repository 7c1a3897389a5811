"""Stored images of one split by row of the index, from the tars: checked, decoded, several at a time where asked."""

import io
import os
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import Future
from functools import lru_cache
from io import FileIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr_vae.data.index import RESHARD, SplitIndex
from cxr_vae.data.stream import WINDOW
from cxr_vae.errors import UserError

OPEN_TARS = 256
"""Open at a time in a process, well below the usual limit of 1024 files."""


class ShardReader:
    """Reads any row at any time, from any thread.

    With `block` above 1 the file system is asked for the stored bytes of that many neighbouring rows at once, which
    are kept for the rows that a block-shuffled stream wants next (`TrainingStream`).
    """

    def __init__(self, index: SplitIndex, block: int = 1) -> None:
        self.index, self.block = index, block
        self._shard, self._offset = index.numbers("shard"), index.numbers("offset")
        self._size, self._crc32 = index.numbers("size"), index.numbers("crc32")
        self._open_tar = lru_cache(maxsize=OPEN_TARS)(self._open)
        self._blocks: OrderedDict[int, Future[list[memoryview]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        """(S, S) uint8 of one image. UserError where its tar can't be read or is damaged."""
        if self.block == 1:
            (content,) = self._read_range(row, row + 1)
        else:
            content = self._block_of(row)[row % self.block]
        if zlib.crc32(content) != self._crc32[row]:
            path = self.index.shards[self._shard[row]]
            raise UserError(f"{path} is damaged at byte {self._offset[row]} (wrong CRC-32): {RESHARD}")
        return decode(content, self.index.format, self.index.image_size)

    def _block_of(self, row: int) -> list[memoryview]:
        """The stored bytes of each row of a block. Whoever asks first reads it, others wait; the oldest are let go."""
        number = row // self.block
        with self._lock:
            reading = number not in self._blocks
            future = self._blocks.setdefault(number, Future())
            self._blocks.move_to_end(number)
            if len(self._blocks) > 2 * WINDOW:  # a batch may lie in two windows
                self._blocks.popitem(last=False)
        if reading:
            first = number * self.block
            try:
                future.set_result(self._read_range(first, min(first + self.block, len(self.index))))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _read_range(self, first: int, last: int) -> list[memoryview]:
        """The stored bytes of each of the rows first … last - 1, by one read a tar."""
        contents: list[memoryview] = []
        while first < last:
            shard = self._shard[first]
            stop = first + int(np.count_nonzero(self._shard[first:last] == shard))
            start = int(self._offset[first])
            end = int(self._offset[stop - 1]) + int(self._size[stop - 1])
            content = memoryview(self._pread(int(shard), start, end - start))
            for row in range(first, stop):
                place = int(self._offset[row]) - start
                contents.append(content[place : place + int(self._size[row])])
            first = stop
        return contents

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            with self._lock:  # or two threads that miss at once would open it twice
                tar = self._open_tar(shard)
            # `tar` is held until it was read, whatever the cache does meanwhile.
            return os.pread(tar.fileno(), size, offset)
        except OSError as error:
            path = self.index.shards[shard]
            raise UserError(
                f"{path} can't be read ({error.strerror}): mend that and run the same command again"
            ) from None

    def _open(self, shard: int) -> FileIO:
        # Closed when the cache lets go of it.
        return FileIO(self.index.shards[shard])


def decode(content: memoryview, format: str, side: int) -> npt.NDArray[np.uint8]:
    """(side, side) uint8 of one stored image."""
    if format == "raw":  # a NumPy file: the array is all that stands behind its header
        return np.frombuffer(content[-side * side :], np.uint8).reshape(side, side)
    return np.asarray(Image.open(io.BytesIO(content)))
