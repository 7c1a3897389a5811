"""Sharded checkpoints that are whole or not there: torch.distributed.checkpoint in a directory published by a rename.

Every rank writes its part into `step-….tmp`; then the first rank adds `manifest.json` with the size and SHA-256 of each
file, and renames the directory. Nothing published is modified afterwards. Loading takes the newest directory that
verifies, at any number of ranks.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from cxr_vae import __version__
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.files import read_json, sha256_of, sync_directory, write_json
from cxr_vae.state import TrainState

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{10})")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, `step-0000000500` and so on."""

    directory: Path
    world: World
    keep: int
    identity: Mapping[str, Any]
    """What a checkpoint belongs to (the configuration, the splits' index hashes), kept in its manifest."""

    def save(self, state: TrainState) -> None:
        """Writes and publishes the state, all ranks together; then removes all but the newest `keep`."""
        final = self.directory / f"step-{state.step:010d}"
        temporary = final.with_suffix(".tmp")
        if self.world.is_main and not final.exists():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if self.world.broadcast(final.exists()):
            return
        try:
            with _alone_is_meant():
                dcp_save(
                    state.state_dict(),
                    storage_writer=FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True),
                    no_dist=not dist.is_initialized(),
                )
            if self.world.is_main:
                self._publish(temporary, final, state)
        except (CheckpointException, OSError) as error:  # the first derives from BaseException
            cause = _failed_write(error)
            if cause is None:
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.directory).free / 1e6
            raise UserError(
                f"{final}: this checkpoint can't be written ({cause}; {free:.1f} MB are free there); "
                "earlier ones are whole: make room and run the same command again"
            ) from None
        if self.world.is_main:
            self._prune()
        self.world.barrier()

    def load_latest(self, state: TrainState) -> tuple[str | None, list[str]]:
        """Loads the newest checkpoint that verifies into `state`.

        Returns its name (None: there is none, the state is untouched) and a sentence for each that was skipped. Those
        are renamed to `….damaged`: else they would stand in the way of what is saved when their step comes again.
        """
        name, skipped = self.world.broadcast(self._newest_whole() if self.world.is_main else None)
        if name is None:
            return None, skipped
        tensors = state.state_dict()
        with _alone_is_meant():
            dcp_load(
                tensors,
                storage_reader=FileSystemReader(self.directory / name),
                no_dist=not dist.is_initialized(),
            )
        state.load_state_dict(tensors)
        return name, skipped

    def names(self) -> list[str]:
        """Published checkpoints, newest first."""
        found = self.directory.iterdir() if self.directory.is_dir() else iter(())
        return sorted((path.name for path in found if NAME.fullmatch(path.name)), reverse=True)

    def _publish(self, temporary: Path, final: Path, state: TrainState) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        manifest = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "world_size": self.world.size,
            "versions": {"cxr_vae": __version__, "torch": torch.__version__},
            **self.identity,
            "files": files,
        }
        write_json(temporary / MANIFEST, manifest)
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(self.directory)

    def _prune(self) -> None:
        for name in self.names()[self.keep :]:
            shutil.rmtree(self.directory / name)

    def _newest_whole(self) -> tuple[str | None, list[str]]:
        skipped: list[str] = []
        for name in self.names():
            fault = find_fault(self.directory / name, self.identity)
            if fault is None:
                return name, skipped
            aside = (self.directory / name).with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self.directory / name).rename(aside)
            skipped.append(f"{self.directory / name} skipped: {fault}; it is now {aside.name}")
        return None, skipped


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """One process needs no process group; torch warns of that at each save and load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _failed_write(error: BaseException) -> BaseException | None:
    """What the file system refused; None where the error is of another kind, a bug.

    torch's zip writer hides a full disk behind a RuntimeError about a position in the file.
    """
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    writes = [cause for cause in causes if isinstance(cause, OSError) or "inline_container" in str(cause)]
    return writes[0].__context__ or writes[0] if writes else None


def find_fault(path: Path, identity: Mapping[str, Any]) -> str | None:
    """Why the checkpoint at `path` can't be used, in a few words; None where it is whole, every byte of it.

    Raises UserError where it is whole but of other data than `identity` names: no older checkpoint would be right.
    """
    try:
        manifest = read_json(path / MANIFEST, hint="")
        files, index_hashes = manifest["files"], manifest["index_hashes"]
    except UserError:
        return f"its {MANIFEST} is missing or damaged"
    except (KeyError, TypeError):
        return f"its {MANIFEST} is not a checkpoint's"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 is not the manifest's)"
    if index_hashes != identity["index_hashes"]:
        raise UserError(
            f"{path} was trained on other images than data.shards holds now (another index hash): "
            "restore those shards or choose another run_dir"
        )
    return None
