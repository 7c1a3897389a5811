"""Where a run is, in a file of its directory: `heartbeat.json`, for people and launchers who look from outside."""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_BEATS = 5.0

STALE_AFTER_S = 120.0
"""Longer than a beat may take to be seen through a network file system, and than most pauses of the loop."""


class Heartbeat:
    """Written by the process that owns the loop, so that it stops when the loop does.

    It holds `state` (starting, training, stopped, finished), `step`, `num_steps`, `samples_seen`, `images_per_s` since
    the last beat, `left_s`, and what else the caller knows. A file that can't be written is no reason to stop.
    """

    def __init__(self, path: Path, num_steps: int, batch_size: int, *, enabled: bool = True) -> None:
        self.path, self.num_steps, self.batch_size, self.enabled = path, num_steps, batch_size, enabled
        self._last: tuple[float, int] | None = None
        self._images_per_s: float | None = None

    def is_due(self) -> bool:
        """Whether the last beat is some seconds old."""
        return self.enabled and (self._last is None or time.monotonic() - self._last[0] >= SECONDS_BETWEEN_BEATS)

    def beat(self, state: str, step: int, facts: Mapping[str, Any]) -> None:
        """Replaces the file."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._last is not None and step > self._last[1]:
            self._images_per_s = (step - self._last[1]) * self.batch_size / (now - self._last[0])
        self._last = (now, step)
        speed = self._images_per_s
        record = {
            "state": state,
            "step": step,
            "num_steps": self.num_steps,
            "images_per_s": speed and round(speed, 2),
            "left_s": speed and round((self.num_steps - step) * self.batch_size / speed, 1),
            **facts,
            "time": time.time(),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text(json.dumps(record, indent=2) + "\n")  # not flushed: the loop must not wait for a disk
            temporary.replace(self.path)
        except OSError:
            pass


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """The last beat with its `age_s`; None where there is none."""
    try:
        record = json.loads(path.read_text())
        return {**record, "age_s": max(0.0, time.time() - record["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
