"""The order of training: one endless sequence of images that depends on (seed, epoch) alone.

Position p of the stream lies in epoch p // N; the epoch's images come in a permutation drawn from (seed, epoch). A step
takes the next `global_batch_size` positions and a rank its part of those; so neither ranks nor workers nor
accumulation change the order, nothing is dropped, repeated or padded within an epoch, and the reader's whole state is
one integer.

With `block` above 1, epochs are shuffled by block, for shards that are read from a parallel file system at each use:
the blocks of that many neighbouring images come in a random order, and images in a random order within a window of 64
blocks.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

WINDOW = 64
"""Blocks whose images are mixed with one another."""


class TrainingStream:
    """Which of N images stands at which position of the stream of `seed`."""

    def __init__(self, num_images: int, seed: int, block: int = 1) -> None:
        self.num_images, self.seed, self.block = num_images, seed, block
        # Two, since a batch may reach over the end of an epoch.
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """(N,) the order of the images in `epoch`.

        The ranks of Philox's raw output and not Generator.permutation: NumPy guarantees the first to stay the same in
        all its versions, the second not.
        """
        random = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        draws = random.random_raw(self.num_images)
        if self.block == 1:
            return np.argsort(draws, kind="stable")
        num_blocks = -(-self.num_images // self.block)
        window_of_block = np.empty(num_blocks, np.int64)
        window_of_block[np.argsort(random.random_raw(num_blocks), kind="stable")] = np.arange(num_blocks) // WINDOW
        return np.lexsort((draws, np.repeat(window_of_block, self.block)[: self.num_images]))

    def rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop - start,) image numbers at the positions start…stop."""
        pieces = []
        while start < stop:
            epoch, first = divmod(start, self.num_images)
            count = min(stop - start, self.num_images - first)
            pieces.append(self.permutation(epoch)[first : first + count])
            start += count
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
