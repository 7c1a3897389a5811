"""What asks a run to stop: signals, the death of its launcher, its own time limit."""

import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing failed, run the same command again to go on."""

INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT

PARENT = os.getppid()
"""Noted before torch is imported, which takes seconds."""

SAME_INTERRUPT_S = 2.0
"""Ctrl-C under torchrun reaches a rank twice, from the terminal and from torchrun: that is one."""

os.register_at_fork(
    after_in_child=lambda: signal.set_wakeup_fd(-1)
)  # a child's signals are none of its parent's business


class StopSignal:
    """While entered, signals and their like ask to stop: at once, or once `defer` was called, when the loop looks.

    The death of the torchrun that started this process is such a signal, too: else its ranks would go on unseen. So is
    the end of `max_minutes` since this process began, for the loop. A second Ctrl-C leaves at once in any case. In a
    forked child signals do nothing at all.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._signal: signal.Signals | None = None
        self._deferred = False
        self._owner = os.getpid()
        self._torchrun = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._max_minutes = max_minutes
        self._began = psutil.Process().create_time()

    def defer(self) -> None:
        """From now on there is something to save: the owner of the loop asks for `reason`."""
        self._deferred = True

    @property
    def reason(self) -> str | None:
        """Why to save and leave at the next opportunity, in words; None where there is no reason."""
        if self._signal is not None:
            return self._signal.name
        if self._orphaned():
            return "the end of torchrun"
        if self._max_minutes is not None and time.time() - self._began >= 60 * self._max_minutes:
            return f"train.max_minutes={self._max_minutes:g}"
        return None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        # A thread sees them too: Python's handlers wait while the main thread waits for other processes.
        self._seen, self._sent = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_fd = signal.set_wakeup_fd(self._sent, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._sent)
        self._watcher.join()
        os.close(self._seen)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._signal = signal.Signals(number)

    def _orphaned(self) -> bool:
        return self._torchrun is not None and os.getppid() != self._torchrun

    def _watch(self) -> None:
        """Leaves at once where nothing is to be saved, and at the second Ctrl-C."""
        interrupted: float | None = None
        while True:
            ready, _, _ = select.select([self._seen], [], [], 1.0)
            number = os.read(self._seen, 1) if ready else None
            if number == b"":
                return  # left
            seen = signal.Signals(number[0]) if number and number[0] in SIGNALS else None  # others are others' business
            if not self._deferred and (seen or self._orphaned()):
                reason = seen.name if seen else "the end of torchrun"
                _leave(STOPPED_EXIT_CODE, f"stopped before the first step ({reason}); the same command starts again")
            if seen == signal.SIGINT:
                interrupted = interrupted or time.monotonic()
                if time.monotonic() - interrupted > SAME_INTERRUPT_S:
                    _leave(INTERRUPTED_EXIT_CODE, "interrupted twice: nothing saved; earlier checkpoints are whole")


def _leave(code: int, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{message}\n".encode())
    os._exit(code)
