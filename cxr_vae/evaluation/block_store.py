"""Results by block of positions, each in a file of its own, kept under the hash of what they were computed from.

So work that is broken off goes on where it was, ranks share their parts through the file system, jobs share what they
have in common, and nothing that has changed is ever taken for what it was.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cxr_vae.files import write_atomically
from cxr_vae.noise import BLOCK

FORMAT = 1


class BlockStore:
    """Tensors (n, …) of positions start…start + n, n at most BLOCK, below `root` in a folder named by `identity`."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def save(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a block; others may be writing the same at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{start:09d}.{socket.gethostname()}-{os.getpid()}"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(own, save(contiguous, {"sha256": hash_of(contiguous)}))
        own.replace(self._path(start))

    def load(self, start: int) -> dict[str, Tensor] | None:
        """A block; None where it is not there, or damaged."""
        try:
            with safe_open(self._path(start), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                return tensors if file.metadata()["sha256"] == hash_of(tensors) else None
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def num_at(self, start: int) -> int:
        """How many positions a block holds whole; 0 where it is not there."""
        return min((len(tensor) for tensor in (self.load(start) or {}).values()), default=0)

    def load_all(self, num: int) -> dict[str, Tensor]:
        """Every position below `num` exactly once, in order; RuntimeError where a block is missing."""
        blocks = []
        for start in range(0, num, BLOCK):
            block, count = self.load(start), min(BLOCK, num - start)
            if block is None or any(len(tensor) < count for tensor in block.values()):
                raise RuntimeError(f"{self._path(start)} is missing or damaged")
            blocks.append({name: tensor[:count] for name, tensor in block.items()})
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
