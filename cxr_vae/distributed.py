"""The processes of a stage, one or many: who am I, which part is mine, what do we have together.

Knows torch.distributed and the environment variables torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), nothing of any scheduler: whoever starts the processes sets those.
"""

import gc
import inspect
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cxr_vae.allocator import keep_freed_memory
from cxr_vae.errors import LostPeersError, UserError
from cxr_vae.workers import num_cores

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others in a collective operation, unless it is told otherwise."""

TORCHRUN_PATIENCE = timedelta(seconds=30)
"""How long a rank looks for the store of a torchrun: it is there before the rank is, or it was killed."""

ROLL_CALL_S, ROLL_CALLS = 3.0, 10
"""How often, and how many times, ranks look who else gave up waiting: not all do so at the same moment."""

OF_GLOO = re.compile("gloo|application timeout", re.IGNORECASE)
"""Of torch's errors in an operation over gloo: they name its file, or say that the end of another one ended it."""

WAITED = re.compile("timed out|timeout after|application timeout", re.IGNORECASE)
"""Of torch's errors where another rank was waited for, in a collective operation or before the first one."""


@dataclass(frozen=True)
class World:
    """This process among `size` processes, `local_size` of them on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    patience: timedelta = PATIENCE
    """How long it waits for the others in a collective operation."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def slice(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's contiguous part of start…stop; parts differ by one at the most and cover it exactly once."""
        count = stop - start
        return start + count * self.rank // self.size, start + count * (self.rank + 1) // self.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over the ranks, in place; the same result on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is true on any rank; the same answer on every rank, without a GPU."""
        return [bool(count) for count in self.sum_(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def average_buffers(self, module: nn.Module) -> None:
        """Makes the floating-point buffers of the ranks' copies of `module` equal: their mean over the ranks."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not buffers:
            return
        vector = parameters_to_vector(buffers)
        vector_to_parameters(self.sum_(vector) / self.size, buffers)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value of a small picklable object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's picklable object in rank order, on every rank; through `group` where another thread is at it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def all(self, flag: bool) -> bool:
        """Whether the flag is true on every rank; the same answer on every rank."""
        return not self.any(not flag)[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            self.sum_(torch.zeros(1))  # on the CPU: NCCL's barrier takes a device and a stream

    def new_group(self) -> dist.ProcessGroup | None:
        """All ranks once more, on the CPU, for a thread of its own; None for a single process."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=self.patience)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        return group

    def parallel(self, module: nn.Module, *, compress: bool = False) -> nn.Module:
        """`module` with its gradients averaged over the ranks; buffers are `average_buffers`' business.

        `compress`: they travel and are added up in bf16, half the bytes, with errors of up to 2⁻⁸ of each.
        """
        if self.size == 1:
            return module
        # torch 2.15 renamed broadcast_buffers to forward_sync_buffers.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        keep_buffers: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Where three ranks or more add up, the rounding of a sum depends on its place in a bucket. DDP rearranges its
        # buckets after the first step, unless it looks for unused parameters: a resumed run would differ in that step.
        parallel = DistributedDataParallel(
            module, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True, **keep_buffers
        )
        if compress:
            parallel.register_comm_hook(None, bf16_compress_hook)
        return parallel


def gradients_stay_local(module: nn.Module) -> AbstractContextManager[None]:
    """Context in which `parallel`'s module only adds up gradients: all micro-batches of a step but the last."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def world(device: str = "auto", patience: timedelta = PATIENCE) -> Iterator[World]:
    """Joins the processes that torchrun (or a launcher that speaks its variables) started; alone without them.

    `device`: cpu, cuda or auto (the GPU, if any). Tensors on GPUs go through NCCL, those on the CPU through gloo.
    On the CPU each rank takes its share of the cores this process may use, and keeps its memory. Raises
    LostPeersError, within, where another process is gone or is waited for longer than `patience`.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here = World(rank, size, local_rank, local_size, _device(device, local_rank), patience)
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
        torch.backends.cudnn.deterministic = True  # a resumed run should end as one that was not broken off
    else:
        torch.set_num_threads(num_cores(local_size))
        keep_freed_memory()
    if size == 1:
        yield here
        return
    store = None
    try:
        store, _, _ = next(rendezvous("env://", timeout=TORCHRUN_PATIENCE if _torchrun_keeps_store() else patience))
        store.set_timeout(patience)
        store.set(f"name of {rank}", f"rank {rank} on {socket.gethostname()} (process {os.getpid()})")
        backend = _backend(here, torch.cuda.device_count())
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        yield here
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or OF_GLOO.search(str(error)):
            raise LostPeersError(_lost(store, here, str(error))) from error
        raise
    gc.collect()  # see cxr_vae.training.train: a reference cycle would keep DistributedDataParallel
    # Not in a `finally`: after an error the other ranks may hang in a collective, and destroying would wait for them.
    dist.destroy_process_group()


def _lost(store: Any, here: World, error: str) -> str:
    """Which ranks are not there, in words, after a collective operation failed with `error`."""
    if store is None:
        return f"the other processes of this job could not be found ({error})"
    waited, names = WAITED.search(error), ""
    with suppress(RuntimeError):  # whoever keeps the store, rank 0 or torchrun, is gone
        store.set(f"{here.rank} answers", "")  # also where a rank that gave up before closed the connection
        names = ", ".join(_name(store, rank) for rank in _silent(store, here.size)) if waited else ""
    if not waited:
        return f"another process of this job has ended, and its own message says why ({error.splitlines()[0]})"
    return f"no sign of {names or 'the other ranks'} for {here.patience.total_seconds():.0f} s, while the others waited"


def _silent(store: Any, size: int) -> list[int]:
    """The ranks that don't answer, once there is but one, or none has answered for long enough."""
    for _ in range(ROLL_CALLS):
        time.sleep(ROLL_CALL_S)
        silent = [rank for rank in range(size) if not store.check([f"{rank} answers"])]
        if len(silent) <= 1:
            break
    return silent


def _name(store: Any, rank: int) -> str:
    key = f"name of {rank}"
    if not store.check([key]):  # `get` would wait for it
        return f"rank {rank} (which never came)"
    return str(store.get(key).decode())


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=auto or cpu, or install torch's CUDA build")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _backend(here: World, num_gpus: int) -> str:
    """What carries tensors between the ranks. NCCL refuses two ranks on one GPU; gloo, by way of the CPU, doesn't."""
    if here.device.type == "cpu":
        return "gloo"
    if here.local_size <= num_gpus:
        return "cpu:gloo,cuda:nccl"
    if here.local_rank == 0:
        print(f"{here.local_size} processes share {num_gpus} GPU: one process a GPU is faster", flush=True)
    return "cpu:gloo,cuda:gloo"
