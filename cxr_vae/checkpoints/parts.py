"""The parts of a checkpoint: torch.distributed.checkpoint divides it among the ranks, safetensors holds them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from cxr_vae.checkpoints.manifest import Files, describe_files
from cxr_vae.distributed import World


class PartWriter(HuggingFaceStorageWriter):
    """Writes a rank's part straight from the tensors' memory.

    DCP's own writer first builds the whole file in memory, with Python's lock held, which would stop the training loop.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the tensors of this rank's plan, all of them whole, and flushes them to the disk."""
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), "only tensors are saved"
            tensors[item.index.fqn] = tensor
        if tensors:
            path = Path(self.path) / part_name(plan.storage_data["shard_index"])
            try:
                save_file(tensors, path)
            except SafetensorError as error:
                raise _as_os_error(error) from error
            with path.open("rb") as file:
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items])
        return done


def part_name(number: int) -> str:
    """`shard-00001.safetensors`, of the first rank."""
    return f"shard-{number:05d}.safetensors"


def write_tensors(directory: Path, tensors: dict[str, Tensor], world: World, group: dist.ProcessGroup | None) -> Files:
    """Every rank of `group` writes its part of tensors that all hold, and flushes it to the disk.

    Returns what was written by all of them; each rank reports its own part, since a network file system may list
    that of another machine late. Raises OSError on the first rank, at least, where one can't write.
    """
    with _plain_errors():
        dcp_save(
            tensors,
            storage_writer=PartWriter(str(directory), save_distributed=True),
            process_group=group,
            no_dist=group is None,
        )
    mine: Files | OSError
    try:
        mine = describe_files(directory.glob(part_name(world.rank + 1)))
    except OSError as error:
        mine = error  # told below: the others wait there
    files: Files = {}
    for part in world.all_gather(mine, group):
        if isinstance(part, OSError):
            raise part
        files |= part
    return files


def read_tensors(directory: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fills tensors, by name, from a checkpoint of any number of ranks; every rank of `group` reads all of them."""
    reader = HuggingFaceStorageReader(str(directory))
    with _plain_errors():
        dcp_load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises what went wrong on some rank, and not DCP's CheckpointException, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


def _as_os_error(error: SafetensorError) -> Exception:
    """A full disk and its like, which safetensors tells in words: `… No space left on device (os error 28)`."""
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error
