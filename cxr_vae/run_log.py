"""What a training run records: losses that are the same for equal runs, and speed, which never is."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cxr_vae.files import write_atomically
from cxr_vae.losses import Losses, bits_per_dim
from cxr_vae.run_dir import RunDir


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


def loss_record(losses: Losses, kl_weight: float, image_size: int) -> dict[str, float]:
    """Mean losses as named figures; bits/dim is that of the negative ELBO, whatever the KL weight."""
    return {
        "loss_nats": float(losses.total(kl_weight)),
        "reconstruction_nats": float(losses.reconstruction),
        "kl_nats": float(losses.kl),
        "bits_per_dim": bits_per_dim(float(losses.total()), image_size),
    }


def in_words(record: dict[str, float]) -> str:
    """`610.2 = 590.1 + KL 20.1 nats/image, 0.851 bits/dim`."""
    return (
        f"{record['loss_nats']:.1f} nats/image (reconstruction {record['reconstruction_nats']:.1f}, "
        f"KL {record['kl_nats']:.1f}, {record['bits_per_dim']:.3f} bits/dim)"
    )


class RunLog:
    """metrics.jsonl, speed.jsonl and TensorBoard of a run that goes on after `step` steps.

    Records of later steps, of work that was lost, are removed first. With `enabled=False` (the ranks other than the
    first) nothing is recorded.
    """

    def __init__(self, run: RunDir, step: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.note = ""
        """The last loss, for the progress bar."""
        self._started = self._last_time = time.perf_counter()
        self._last_step = step
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        for path in (run.metrics, run.speed):
            kept = [record for record in read_records(path) if record["step"] <= step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._metrics: IO[str] = run.metrics.open("a")
        self._speed: IO[str] = run.speed.open("a")
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def metrics(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; its numbers go to TensorBoard too, as kind/name or kind/group/name."""
        if not self.enabled:
            return
        self._metrics.write(json.dumps({"kind": kind, "step": step, **record}) + "\n")
        self._metrics.flush()
        for name, value in record.items():
            for inner, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                self._board.add_scalar(f"{kind}/{name}{'/' if inner else ''}{inner}", number, step)

    def step(self, step: int, batch_size: int, record: Mapping[str, Any]) -> None:
        """Losses of one step, and the speed since the last call."""
        if not self.enabled:
            return
        self.note = f"loss {record['loss_nats']:.1f}"
        self.metrics("step", step, record)
        now = time.perf_counter()
        images_per_s = (step - self._last_step) * batch_size / (now - self._last_time)
        self._last_step, self._last_time = step, now
        speed = {"step": step, "elapsed_s": round(now - self._started, 3), "images_per_s": round(images_per_s, 2)}
        self._speed.write(json.dumps(speed) + "\n")
        self._speed.flush()
        self._board.add_scalar("speed/images_per_s", images_per_s, step)

    def sync(self) -> None:
        """Flushes to the disk all that was recorded, so that no checkpoint outlives its metrics."""
        if self.enabled:
            os.fsync(self._metrics.fileno())
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self.enabled:
            self._metrics.close()
            self._speed.close()
            self._board.close()
