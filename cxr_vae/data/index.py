"""What is known of every sharded image, as arrays; and the manifest that says whether the shards are whole.

A shard directory holds, for each split, tars that any WebDataset reader takes and one `<split>.index.safetensors`, in
which row i says where image i lies. Columns are read when they are asked for, so opening an index of millions of
images is quick and small. `manifest.json` is written last and describes the rest.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from cxr_vae.errors import UserError
from cxr_vae.files import read_json, sha256_of, write_atomically

NUMBERS: Mapping[str, Any] = {
    "shard": np.uint32,  # number of the tar within the split
    "offset": np.int64,  # of the image's first byte in the tar
    "size": np.uint32,  # bytes of the image as stored
    "crc32": np.uint32,  # of those bytes
    "label": np.uint16,  # index into the manifest's classes
    "width": np.uint32,  # of the original, in pixels
    "height": np.uint32,
}
TEXTS = ("key", "source", "patient")
"""Columns of text: `key` in the tar, `source` relative to the source folder, `patient`."""

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RESHARD = "delete its folder and write the shards again with `cxr-vae shard`"

Columns = dict[str, npt.NDArray[Any]]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows of one shard as columns: numbers, `sha256` (N, 32) of the original file, texts as (N, width) uint8."""
    columns: Columns = {name: np.array([row[name] for row in rows], dtype) for name, dtype in NUMBERS.items()}
    columns["sha256"] = np.array([list(row["sha256"]) for row in rows], np.uint8).reshape(len(rows), 32)
    for name in TEXTS:
        texts = np.array([os.fsencode(row[name]) for row in rows], dtype=np.bytes_)
        columns[name] = texts.view(np.uint8).reshape(len(rows), texts.itemsize)
    return columns


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Columns of several shards one after another; texts are padded to the widest."""
    joined: Columns = {}
    for name in parts[0]:
        width = max(part[name].shape[-1] for part in parts) if name in TEXTS else 0
        arrays = (
            np.pad(part[name], ((0, 0), (0, width - part[name].shape[1]))) if name in TEXTS else part[name]
            for part in parts
        )
        joined[name] = np.concatenate(list(arrays))
    return joined


def save_columns(path: Path, columns: Columns) -> None:
    """Columns as a safetensors file, atomically; the same columns give the same bytes."""
    write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in columns.items()}))


class SplitIndex:
    """One split of a shard directory: N images in stored order, each column read from the file when first used."""

    def __init__(self, directory: Path, split: str, manifest: Mapping[str, Any]) -> None:
        entry = manifest["splits"][split]
        self.directory, self.split = directory, split
        self.path = directory / entry["index"]["file"]
        self.image_size = int(manifest["image_size"])
        self.fit = str(manifest["fit"])
        self.format = str(manifest["format"])
        self.classes: list[str] = manifest["classes"]
        self.split_file_sha256: str | None = manifest.get("split_file_sha256")  # older shards have none
        self.content_hash: str = entry["index"]["sha256"]
        """SHA-256 of the index file, which names every image by its own SHA-256."""
        self.shards = [directory / shard["file"] for shard in entry["shards"]]
        self._sizes = [int(shard["bytes"]) for shard in entry["shards"]]
        self._count = int(entry["count"])

    def __len__(self) -> int:
        return self._count

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A numeric column or `sha256`, of length N."""
        with safe_open(self.path, framework="numpy") as file:
            array: npt.NDArray[Any] = file.get_tensor(name)
        return array

    def texts(self, name: str, rows: Sequence[int] | None = None) -> list[str]:
        """A column of text, of length N, or what stands in it at `rows`, without reading the rest."""
        if rows is None:
            texts = self.numbers(name)
        else:
            with safe_open(self.path, framework="numpy") as file:
                column = file.get_slice(name)
                texts = np.concatenate([column[row : row + 1] for row in rows])
        return [os.fsdecode(text) for text in texts.view(f"S{texts.shape[1]}")[:, 0]]

    @cached_property
    def labels(self) -> npt.NDArray[np.uint16]:
        """(N,) class numbers."""
        return self.numbers("label")

    def verify(self) -> None:
        """Raises UserError unless the index is byte for byte what the manifest says and every shard has its size."""
        if not self.path.is_file():
            raise UserError(f"{self.path} is missing: {RESHARD}")
        if sha256_of(self.path) != self.content_hash:
            raise UserError(f"{self.path} is damaged (its SHA-256 is not the manifest's): {RESHARD}")
        for path, size in zip(self.shards, self._sizes, strict=True):
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not the {size} of the manifest"
                raise UserError(f"{path} {state}: {RESHARD}")


@dataclass(frozen=True)
class ShardDirectory:
    """A finished shard directory."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "ShardDirectory":
        """Reads the manifest; UserError where there is none or it is damaged."""
        if not path.is_dir():
            raise UserError(f"{path}: no such shard directory; make it with `cxr-vae shard SOURCE {path}`")
        manifest = read_json(path / MANIFEST, hint="these shards are not finished: run `cxr-vae shard`")
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path / MANIFEST} is not a manifest of format version {FORMAT_VERSION}: {RESHARD}")
        return cls(path, manifest)

    def split(self, name: str) -> SplitIndex:
        """The verified index of a split."""
        if name not in self.manifest["splits"]:
            raise UserError(f"{self.path} has no split {name}; it has {', '.join(self.manifest['splits'])}")
        index = SplitIndex(self.path, name, self.manifest)
        index.verify()
        return index
