"""What a person sees while a stage works: a bar on a terminal, now and then a line in a log file."""

import errno
import io
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} {rate_fmt}{postfix}"
"""Short enough that the last loss still shows in 60 columns."""


class Progress:
    """Counts up to `total` on stderr: a tqdm bar where that is a terminal, else a line every ten seconds.

    With `enabled=False` (the ranks other than the first) it prints nothing.
    """

    def __init__(self, total: int, what: str, *, unit: str = "img", done: int = 0, enabled: bool = True) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self.done_at_start = done
        self.started = self.printed = time.monotonic()
        self.bar = None
        self.enabled = enabled
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, smoothing=0.05, bar_format=BAR
            )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done (at most up to the total); `note` stands behind the figures."""
        count = min(count, self.total - self.done)
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            print(self.line(note), file=sys.stderr, flush=True)

    def line(self, note: str = "") -> str:
        """`train: 320/5216 img, 104.2 img/s, 0:47 left, loss 612.3`."""
        speed = (self.done - self.done_at_start) / max(time.monotonic() - self.started, 1e-9)
        left = clock((self.total - self.done) / speed) if speed else "?"
        figures = f"{self.what}: {self.done}/{self.total} {self.unit}, {speed:.1f} {self.unit}/s, {left} left"
        return figures + (f", {note}" if note else "")

    def say(self, text: str) -> None:
        """A line on stdout that doesn't tear the bar."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


class _Log(io.FileIO):
    """A file that takes what its disk refuses."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return memoryview(data).nbytes


def outlive_full_log_disk() -> None:
    """From now on what is printed is lost where the disk it goes to is full; else a job would end for want of a log.

    For stages, whose results are files and who print for the record only.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        stream.flush()
        raw = io.BufferedWriter(_Log(descriptor, "wb", closefd=False))
        encoding, errors = stream.encoding, stream.errors
        setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True))


def clock(seconds: float) -> str:
    """`0:47`, `12:05`, `3:20:00`."""
    return str(tqdm.format_interval(seconds)).removeprefix("0")


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
