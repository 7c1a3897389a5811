"""Memory that the ranks of one machine have in common."""

import os
from pathlib import Path

import torch
from torch import Tensor

from cxr_vae.distributed import World


def shared_zeros(num_bytes: int, here: World) -> tuple[Tensor, int, int]:
    """(num_bytes,) uint8 that all ranks of a machine see and change, and this rank's number of how many they are.

    It is a file without a name or a place on a disk (memfd), so nothing is left behind however the ranks end.
    """
    if here.size == 1:
        return torch.zeros(num_bytes, dtype=torch.uint8), 0, 1
    mine = os.memfd_create("cxr_vae")
    try:
        os.ftruncate(mine, num_bytes)
        machine = _machine()
        all_ranks = here.all_gather((machine, f"/proc/{os.getpid()}/fd/{mine}"))
        neighbours = [rank for rank, (other, _) in enumerate(all_ranks) if other == machine]
        memory = torch.from_file(all_ranks[neighbours[0]][1], shared=True, size=num_bytes, dtype=torch.uint8)
        here.barrier()  # nobody closes what another has yet to open
    finally:
        os.close(mine)
    return memory, neighbours.index(here.rank), len(neighbours)


def _machine() -> tuple[str, int]:
    """Equal for processes that see each other below /proc: the boot of a kernel, and the container on it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), Path("/proc/self/ns/pid").stat().st_ino
