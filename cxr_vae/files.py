"""Files that are either whole or not there: what every stage writes its results with."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cxr_vae.errors import UserError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes `content` beside `path`, flushes it to the disk and renames it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise naming(path, error) from None


def naming(path: Path, error: OSError) -> OSError:
    """The error with the file it befell: a full disk doesn't say by itself what it had no room for."""
    return OSError(error.errno, error.strerror, error.filename or str(path))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *, hint: str) -> Any:
    """The content of a JSON file; UserError with `hint` where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {hint}") from None
    except ValueError:
        raise UserError(f"{path} is damaged (not valid JSON): {hint}") from None


def keep_earlier(path: Path) -> Path | None:
    """Renames a file that is about to be replaced to `results.1.json`, .2.json and so on; None where there is none."""
    if not path.is_file():
        return None
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(kept)


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where what can be computed anew is kept for all runs of this user: CXR_VAE_CACHE, else ~/.cache/cxr_vae."""
    own = os.environ.get("CXR_VAE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxr_vae"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
