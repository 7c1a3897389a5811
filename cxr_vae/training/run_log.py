"""What a training run records: losses that are the same for equal runs, and speed, which never is."""

import contextlib
import json
import mmap
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxr_vae.files import naming
from cxr_vae.losses.elbo import Losses, bits_per_dim
from cxr_vae.run_dir import RunDir
from cxr_vae.training.stopwatch import Stopwatch


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file, up to a line that a kill cut short."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def read_epochs(run: RunDir) -> list[dict[str, Any]]:
    """The records of a run's finished epochs."""
    return [record for record in read_records(run.metrics) if record["kind"] == "epoch"]


def cut_after(path: Path, step: int) -> None:
    """Cuts a .jsonl file behind its last whole record of at most `step`, reading only what it cuts, from the end."""
    path.touch()
    with path.open("r+b") as file:
        keep = 0
        if os.fstat(file.fileno()).st_size:  # else there is nothing to map
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                keep = text.rfind(b"\n") + 1  # a kill may have cut the last line short
                while keep:
                    start = text.rfind(b"\n", 0, keep - 1) + 1
                    with contextlib.suppress(ValueError, TypeError, KeyError):  # what a power cut left
                        if json.loads(text[start:keep])["step"] <= step:
                            break
                    keep = start
        file.truncate(keep)
        os.fsync(file.fileno())


def loss_record(losses: Losses, kl_weight: float, image_size: int) -> dict[str, float]:
    """Mean losses as named figures; bits/dim is that of the negative ELBO, whatever the KL weight."""
    return {
        "loss_nats": float(losses.total(kl_weight)),
        "reconstruction_nats": float(losses.reconstruction),
        "kl_nats": float(losses.kl),
        "bits_per_dim": bits_per_dim(float(losses.total()), image_size),
    }


class _Lines:
    """A file of lines that keeps what a full disk refuses until `sync`; two threads may use it."""

    def __init__(self, path: Path, step: int) -> None:
        cut_after(path, step)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._lock = threading.Lock()

    def add(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self._pending += json.dumps(record).encode() + b"\n"
            with contextlib.suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Until all is on the disk; OSError where it can't be."""
        try:
            with self._lock:
                self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise naming(self.path, error) from None

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


class RunLog:
    """metrics.jsonl, speed.jsonl and TensorBoard of a run. With `enabled=False` (ranks > 0) nothing is recorded."""

    def __init__(self, run: RunDir, step: int, watch: Stopwatch, *, enabled: bool = True) -> None:
        """Opens the files of a run that goes on after `step` steps; records of later ones go: that work is lost.

        `watch` tells what the time goes into.
        """
        self.run, self.enabled = run, enabled
        self._board: Any = None
        self.loss_nats: float | None = None
        """Of the step that was logged last."""
        self.test_loss_nats: float | None = None
        """Of the epoch that ended last, in this attempt."""
        self._watch, self._last_seconds = watch, dict(watch.seconds)
        self._started = self._last_time = time.perf_counter()
        self._last_step = self._begun_after = step
        if enabled:
            self._metrics, self._speed = _Lines(run.metrics, step), _Lines(run.speed, step)

    @property
    def note(self) -> str:
        """The last loss, for the progress bar."""
        return "" if self.loss_nats is None else f"loss {self.loss_nats:.1f}"

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.enabled:
            self._metrics.add({"kind": kind, "step": step, **record})

    def epoch(self, step: int, epoch: int, train: Mapping[str, float], test: Mapping[str, float]) -> None:
        """Losses of an epoch."""
        self.test_loss_nats = test.get("loss_nats")
        self.metrics("epoch", step, {"epoch": epoch, "train": train, "test": test})

    def metrics(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; its numbers go to TensorBoard too, as kind/name or kind/group/name."""
        if not self.enabled:
            return
        self.write(kind, step, record)
        for name, value in record.items():
            for inner, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                self._plot(f"{kind}/{name}{'/' if inner else ''}{inner}", number, step)

    def step(self, step: int, batch_size: int, record: Mapping[str, Any]) -> None:
        """Losses of one step, and the speed since the last call."""
        if not self.enabled:
            return
        self.loss_nats = record.get("loss_nats")
        self.metrics("step", step, record)
        now = time.perf_counter()
        images_per_s = (step - self._last_step) * batch_size / (now - self._last_time)
        self._last_step, self._last_time = step, now
        spent = {f"{kind}_s": round(total - self._last_seconds[kind], 4) for kind, total in self._watch.seconds.items()}
        self._last_seconds = dict(self._watch.seconds)
        speed = {"step": step, "elapsed_s": round(now - self._started, 3), "images_per_s": round(images_per_s, 2)}
        self._speed.add(speed | spent)
        self._plot("speed/images_per_s", images_per_s, step)

    def _plot(self, name: str, number: float, step: int) -> None:
        """A point for TensorBoard, which is drawn for as long as the disk takes it: metrics.jsonl has all of it."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import, so after the first steps

            self._board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self._begun_after + 1)
        with contextlib.suppress(OSError):
            self._board.add_scalar(name, number, step)

    def sync(self) -> None:
        """Flushes to the disk all that was recorded; OSError where it can't be."""
        if self.enabled:
            self._metrics.sync()
            if self._board is not None:
                with contextlib.suppress(OSError):
                    self._board.flush()

    def close(self) -> None:
        """Puts what is left of `metrics.jsonl` on the disk, or raises OSError, and closes TensorBoard's file."""
        if self.enabled:
            self._metrics.sync()
            if self._board is not None:
                with contextlib.suppress(OSError):
                    self._board.close()
