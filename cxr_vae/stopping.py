"""Signals that ask a run to stop: they only set a flag, which the training loop looks at between two steps."""

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing failed, run the same command again to go on."""


class StopSignal:
    """While entered, a signal sets `requested` and nothing else; in a forked child it does nothing at all.

    The death of the torchrun that started this process is a signal, too: else its ranks would go on unseen.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._owner = os.getpid()
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def requested(self) -> bool:
        """Whether to save and leave at the next opportunity."""
        return self._signalled or (self._torchrun is not None and os.getppid() != self._torchrun)

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._signalled = True
