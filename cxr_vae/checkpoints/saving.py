"""Sharded checkpoints that are whole or not there: torch.distributed.checkpoint in a directory published by a rename.

Saving copies the state and returns; a thread writes the copy while training goes on. Every rank writes its part into a
directory `….tmp`, as safetensors, so that no code can be hidden in it; then the first rank adds the manifest and
renames the directory. Nothing published is modified afterwards. Loading takes the newest directory that verifies, at
any number of ranks.
"""

import math
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cxr_vae import __version__
from cxr_vae.checkpoints.manifest import find_fault, name_of, published, read_manifest, write_manifest
from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config import CheckpointConfig, Config
from cxr_vae.config_file import differences
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.files import sync_directory

# One process needs no process group; torch would warn of that at each save and load.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Checkpoints:
    """The checkpoints of one run, `step-0000000500` and so on, and the thread that writes them.

    `index_hashes` are those of the splits by name; they and `config` say what a checkpoint belongs to.
    `before_publishing` is called by the first rank when all parts are on the disk; if it raises OSError, the
    checkpoint is not published. `classes` are the names that exported weights carry.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        config: Config,
        index_hashes: Mapping[str, str],
        before_publishing: Callable[[], None] = lambda: None,
        classes: Sequence[str] = (),
    ) -> None:
        self.directory, self.world, self.config, self.options = directory, world, config, config.checkpoint
        self.index_hashes = dict(index_hashes)
        self.before_publishing, self.classes = before_publishing, list(classes)
        self.newest_step: int | None = None
        """Of the checkpoint that was loaded or saved last, published or still being written."""
        self._group = world.new_group()  # the thread's collectives must not mix with those of training
        self._thread = ThreadPoolExecutor(1, "checkpoint", self._begin_thread)
        self._in_flight: Future[None] | None = None
        self._copy: dict[str, Tensor] = {}
        self._last_save = time.monotonic()
        self._attempt = world.broadcast(secrets.token_hex(4))  # no earlier process can write into our directories

    def is_due(self, step: int) -> bool:
        """Whether the options ask for a checkpoint after this step. By the clock, ranks may differ."""
        steps, minutes = self.options.every_steps, self.options.every_minutes
        by_clock = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        return by_clock or (steps is not None and step % steps == 0)

    def save(self, state: TrainState, test_loss: float | None = None, *, last: bool = False) -> None:
        """Copies the state and lets the thread write it, all ranks together; waits for the save before this one.

        `test_loss` is that of exactly this state, where it was tested. Raises UserError, on all ranks, where the save
        before this one failed and `checkpoint.on_failure` is stop. The `last` is tried even then, and waited for.
        """
        if state.step != self.newest_step:
            goes_on = "training goes on" if self.options.on_failure == "continue" else None
            self._finish_write("this step's is tried" if last else goes_on)
            self._begin_write(state, test_loss)
        if last:
            self.wait()

    def _begin_write(self, state: TrainState, test_loss: float | None) -> None:
        self._take_copy(state.state_dict())
        facts = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "test_loss_nats": test_loss,
            "world_size": self.world.size,
            "versions": {"cxr_vae": __version__, "torch": torch.__version__},
            "index_hashes": self.index_hashes,
            "classes": self.classes,
            "config": self.config.model_dump(),
        }
        self._in_flight = self._thread.submit(self._write, name_of(state.step), facts)
        self.newest_step, self._last_save = state.step, time.monotonic()

    def wait(self) -> None:
        """Until the last save is published, on all ranks together; UserError where it failed."""
        self._finish_write(None)

    def close(self) -> None:
        """Ends the thread, which holds on to whoever hears of its saves."""
        self._thread.shutdown()

    def load_latest(self, state: TrainState) -> tuple[str | None, list[str]]:
        """Loads the newest checkpoint that verifies into `state`; first clears away what a kill left half written.

        Returns its name (None: there is none, the state is untouched) and a sentence for each that was skipped. Those
        are renamed to `….unusable`: else they would stand in the way of what is saved when their step comes again.
        Raises UserError where the newest is whole but of other images.
        """
        name, skipped = self.world.broadcast(self._newest_usable() if self.world.is_main else None)
        if name is not None:
            from cxr_vae.checkpoints.parts import read_tensors  # torch.distributed.checkpoint takes a second to import

            tensors = state.state_dict()
            read_tensors(self.directory / name, tensors, self._group)
            state.load_state_dict(tensors)
            self.newest_step = state.step
        return name, skipped

    def _begin_thread(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a thread begins with the first one

    def _take_copy(self, tensors: dict[str, Tensor]) -> None:
        """Copies the state into host memory that is kept for the next save."""
        for name, tensor in tensors.items():
            if name not in self._copy:
                self._copy[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copy[name].copy_(tensor, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def _write(self, name: str, facts: Mapping[str, Any]) -> None:
        """Writes and publishes the copy, then removes what need not be kept. Runs in the thread."""
        from cxr_vae.checkpoints.parts import write_tensors  # see load_latest

        temporary = self.directory / f"{name}.{self._attempt}.tmp"
        try:
            files = write_tensors(temporary, self._copy, self.world, self._group)
            if self.world.is_main:
                self.before_publishing()
                write_manifest(temporary, facts, files)
                fault = find_fault(temporary)
                if fault is not None:
                    raise OSError(f"it doesn't read back from the disk: {fault}")
                publish(temporary, self.directory / name)
                self._prune()
        except Exception:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _prune(self) -> None:
        """Removes what need not be kept; that this fails is no reason to stop."""
        try:
            prune(self.directory, self.options)
        except OSError as error:
            print(f"warning: {error.filename}: an older checkpoint can't be removed ({error.strerror})", flush=True)

    def _finish_write(self, otherwise: str | None) -> None:
        """Waits for the write in flight; its failure is an error, or a warning that says what happens `otherwise`."""
        if self._in_flight is None:
            return
        cause, step = None, self.newest_step
        try:
            self._in_flight.result()
        except OSError as error:
            cause = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        self._in_flight = None
        failure = self.world.broadcast(cause)
        if failure is None:
            return
        self.newest_step = None
        # Not of the directory itself, which may be what could not be made.
        free = f"{shutil.disk_usage(self.directory.parent).free / 1e6:.1f} MB are free there"
        path = self.directory / name_of(step or 0)
        sentence = f"{path}: this checkpoint can't be written ({failure}; {free}); earlier ones are whole"
        if otherwise is None:
            raise UserError(f"{sentence}: mend that and run the same command again")
        if self.world.is_main:
            print(f"warning: {sentence}, {otherwise}", flush=True)

    def _newest_usable(self) -> tuple[str | None, list[str]]:
        for path in self.directory.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        skipped: list[str] = []
        for path in published(self.directory):
            fault = find_fault(path) or self._misfit(path)
            if fault is None:
                return path.name, skipped
            aside = path.with_suffix(".unusable")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            path.rename(aside)
            skipped.append(f"{path} skipped: {fault}; it is now {aside.name}")
        return None, skipped

    def _misfit(self, path: Path) -> str | None:
        """Why a whole checkpoint is not one of this run; UserError where no older one would be right either."""
        manifest = read_manifest(path)
        try:
            changed = differences(Config.model_validate(manifest["config"]), self.config)
        except ValueError:
            return "it is of a version with other options"
        if changed:
            return f"it is of another configuration ({'; '.join(changed)})"
        if manifest["index_hashes"] != self.index_hashes:
            raise UserError(
                f"{path} was trained on other images than data.shards holds now (another index hash): "
                "restore those shards or choose another run_dir"
            )
        return None


def publish(temporary: Path, final: Path) -> None:
    """Makes a finished directory a checkpoint, in one step that survives a power cut."""
    temporary.rename(final)
    sync_directory(final.parent)


def prune(directory: Path, options: CheckpointConfig) -> None:
    """Removes all but the newest `keep`, those at multiples of `keep_every` steps, and the best by test loss."""
    paths = published(directory)
    kept = set(paths[: options.keep])
    best = best_of(directory) if options.best else None
    for path in paths:
        step = int(path.name.removeprefix("step-"))
        if path in kept or path == best or (options.keep_every is not None and step % options.keep_every == 0):
            continue
        doomed = path.with_suffix(".tmp")  # a kill in the middle of removing leaves nothing that looks published
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def best_of(directory: Path) -> Path | None:
    """The checkpoint with the lowest test loss; None where none was tested. Damaged manifests don't count."""
    losses = {}
    for path in published(directory):
        try:
            loss = read_manifest(path)["test_loss_nats"]
        except (UserError, OSError):
            continue
        if loss is not None and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)
