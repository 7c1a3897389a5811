"""What asks a run to stop: signals, the death of its launcher, its own time limit. Asked only between two steps."""

import os
import signal
import time
from types import FrameType, TracebackType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing failed, run the same command again to go on."""

INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT

SAME_INTERRUPT_S = 1.0
"""Ctrl-C under torchrun reaches a rank twice, from the terminal and from torchrun: that is one."""


class StopSignal:
    """While entered, a signal only sets a flag, and in a forked child nothing at all; a second Ctrl-C leaves at once.

    The death of the torchrun that started this process is a signal, too: else its ranks would go on unseen. So is the
    end of `max_minutes` since this process began.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._owner = os.getpid()
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._max_minutes = max_minutes
        self._began = psutil.Process().create_time()

    @property
    def reason(self) -> str | None:
        """Why to save and leave at the next opportunity, in words; None where there is no reason."""
        if self._signal is not None:
            return self._signal.name
        if self._torchrun is not None and os.getppid() != self._torchrun:
            return "the end of torchrun"
        if self._max_minutes is not None and time.time() - self._began >= 60 * self._max_minutes:
            return f"train.max_minutes={self._max_minutes:g}"
        return None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        self._signal = signal.Signals(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > SAME_INTERRUPT_S:
            os.write(2, b"\ninterrupted twice: leaving without saving; earlier checkpoints are whole\n")
            os._exit(INTERRUPTED_EXIT_CODE)
