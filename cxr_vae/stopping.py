"""What asks a run to stop: signals, the death of its launcher, its own time limit. Asked only between two steps."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing failed, run the same command again to go on."""

INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT

SAME_INTERRUPT_S = 1.0
"""Ctrl-C under torchrun reaches a rank twice, from the terminal and from torchrun: that is one."""

os.register_at_fork(
    after_in_child=lambda: signal.set_wakeup_fd(-1)
)  # a child's signals are none of its parent's business


class StopSignal:
    """While entered, a signal only sets a flag, and in a forked child nothing at all; a second Ctrl-C leaves at once.

    The death of the torchrun that started this process is a signal, too: else its ranks would go on unseen. So is the
    end of `max_minutes` since this process began.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: signal.Signals | None = None
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
        # A thread sees them too: Python's handlers wait while the main thread is in a collective operation that hangs.
        self._seen, self._sent = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._seen, True)
        self._previous_fd = signal.set_wakeup_fd(self._sent, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._sent)  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._signal = signal.Signals(number)

    def _watch(self) -> None:
        """Leaves at the second Ctrl-C."""
        first: float | None = None
        while numbers := os.read(self._seen, 1):
            if numbers[0] == signal.SIGINT:
                first = first or time.monotonic()
                if time.monotonic() - first > SAME_INTERRUPT_S:
                    os.write(2, b"\ninterrupted twice: leaving without saving; earlier checkpoints are whole\n")
                    os._exit(INTERRUPTED_EXIT_CODE)
        os.close(self._seen)
