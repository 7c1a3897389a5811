"""What a checkpoint directory must hold, byte for byte, so that damage is found before anything is loaded.

`manifest.json` lists size and SHA-256 of every file with the facts of the checkpoint; `manifest.json.sha256` holds its
own sum, as `sha256sum` writes it.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cxr_vae.errors import UserError
from cxr_vae.files import read_json, sha256_of, sync_directory, write_atomically, write_json

MANIFEST = "manifest.json"
CHECKSUM = "manifest.json.sha256"
NAME = re.compile(r"step-(\d{10})")

Files = dict[str, dict[str, Any]]
"""Size and SHA-256 by name."""


def name_of(step: int) -> str:
    """`step-0000000500`."""
    return f"step-{step:010d}"


def published(directory: Path) -> list[Path]:
    """Published checkpoints in a directory, newest first."""
    found = directory.iterdir() if directory.is_dir() else iter(())
    return sorted((path for path in found if NAME.fullmatch(path.name)), reverse=True)


def describe_files(paths: Iterable[Path]) -> Files:
    """What a manifest says of files."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def write_manifest(directory: Path, facts: Mapping[str, Any], files: Files) -> None:
    """Adds the manifest of `files`, with the facts of the checkpoint, and flushes the directory to the disk."""
    write_json(directory / MANIFEST, {**facts, "files": files})
    write_atomically(directory / CHECKSUM, _checksum(directory))
    sync_directory(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest; UserError with the reason, in a few words, where it is not what was written."""
    if not (directory / MANIFEST).is_file() or not (directory / CHECKSUM).is_file():
        raise UserError(f"its {MANIFEST} or {CHECKSUM} is missing")
    if (directory / CHECKSUM).read_bytes() != _checksum(directory).encode():
        raise UserError(f"its {MANIFEST} is damaged (its SHA-256 is not that of {CHECKSUM})")
    manifest = read_json(directory / MANIFEST, hint="")
    if not isinstance(manifest, dict) or not {"step", "config", "index_hashes", "files"} <= manifest.keys():
        raise UserError(f"its {MANIFEST} is not a checkpoint's of this version")
    return manifest


def find_fault(directory: Path, *, every_byte: bool = True) -> str | None:
    """Why the directory is not what its manifest says, in a few words; None where it is.

    Without `every_byte` only names and sizes are looked at. With it, files are read from the disk and not from the
    memory the kernel keeps them in, as far as it complies.
    """
    try:
        return _find_fault(directory, every_byte)
    except UserError as error:
        return str(error)
    except OSError as error:  # a bad sector, no permission
        return f"{Path(error.filename or directory).name} can't be read ({error.strerror})"


def _find_fault(directory: Path, every_byte: bool) -> str | None:
    files = read_manifest(directory)["files"]
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if every_byte and _sha256_on_disk(file) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 is not the manifest's)"
    foreign = sorted({path.name for path in directory.glob("*.safetensors")} - set(files))
    return f"{foreign[0]} is not in its {MANIFEST}" if foreign else None


def _checksum(directory: Path) -> str:
    return f"{sha256_of(directory / MANIFEST)}  {MANIFEST}\n"


def _sha256_on_disk(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return sha256_of(path)
