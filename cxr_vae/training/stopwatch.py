"""What the time of a training run goes into."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

Kind = Literal["data", "step", "log", "test", "pictures", "checkpoint"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Waiting for images; computing; records, progress and agreement on a stop; test losses; grids; copying the state.

On a GPU the loop only says what is to be done, and waits for it where it looks at numbers: `log` holds that wait too.
"""

Item = TypeVar("Item")


class Stopwatch:
    """Seconds by kind, each moment counted once."""

    def __init__(self) -> None:
        self.seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        """Context whose time is of this kind."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time each takes to come is `data`."""
        while True:
            try:
                with self("data"):
                    item = next(items)
            except StopIteration:
                return
            yield item
