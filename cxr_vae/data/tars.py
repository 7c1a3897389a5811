"""One tar of X-rays and its part of the index: the work of one process in a sharding job."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.numpy import load_file

from cxr_vae.data.images import PNG_STRATEGY, Fit, UnreadableImageError, decode_grey, to_square
from cxr_vae.data.index import Columns, columns_of, save_columns
from cxr_vae.errors import UserError
from cxr_vae.files import naming, sha256_of

PARTS = ".parts"
"""Folder of what a sharding in progress knows of its finished tars; removed when the manifest is written."""


@dataclass(frozen=True)
class Preprocessing:
    """How an original becomes the stored image."""

    image_size: int = 224
    fit: Fit = "stretch"
    format: Literal["png", "jpg", "raw"] = "png"

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 4096:
            raise UserError(f"image size {self.image_size} should be from 8 to 4096 pixels")

    @property
    def suffix(self) -> str:
        """Of the image in the tar; raw images are NumPy files, which WebDataset decodes too."""
        return {"png": "png", "jpg": "jpg", "raw": "npy"}[self.format]


@dataclass(frozen=True)
class Entry:
    """One image to be put into a shard."""

    path: str
    key: str
    label: int
    patient: str


@dataclass(frozen=True)
class Shard:
    """One tar to be written: what a worker process needs to know."""

    name: str
    number: int
    root: str
    out: str
    preprocessing: Preprocessing
    entries: tuple[Entry, ...]

    @property
    def tar(self) -> Path:
        """The finished tar."""
        return Path(self.out) / f"{self.name}.tar"

    @property
    def part(self) -> Path:
        """The tar's part of the index, with what was rejected."""
        return Path(self.out) / PARTS / f"{self.name}.safetensors"


def write_tar(shard: Shard) -> None:
    """Writes one tar and its part of the index, each published by a rename."""
    rows: list[dict[str, Any]] = []
    rejected: list[tuple[str, str]] = []
    temporary = shard.tar.with_suffix(".tar.tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for entry, outcome in read_entries(shard):
                    if isinstance(outcome, str):
                        rejected.append((entry.path, outcome))
                    else:
                        rows.append(_add(tar, shard, entry, **outcome))
            file.flush()
            os.fsync(file.fileno())
        digest = np.frombuffer(bytes.fromhex(sha256_of(temporary)), np.uint8)
        temporary.replace(shard.tar)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise naming(shard.tar, error) from None
    columns = columns_of(rows) if rows else {}
    notes = np.frombuffer(json.dumps(rejected).encode(), np.uint8)
    save_columns(shard.part, columns | {"tar_sha256": digest, "rejected": notes})


def read_entries(shard: Shard) -> Iterator[tuple[Entry, dict[str, Any] | str]]:
    """Each entry with its square image and facts about the original, or with the reason why there is none."""
    for entry in shard.entries:
        path = Path(shard.root, entry.path)
        try:
            if not path.is_file():  # a pipe would be waited on for ever
                raise UnreadableImageError("a broken link" if path.is_symlink() else "not a regular file")
            content = path.read_bytes()
            image = decode_grey(content)
            square = to_square(image, shard.preprocessing.image_size, shard.preprocessing.fit)
        except UnreadableImageError as error:
            yield entry, str(error)
        except OSError as error:
            yield entry, f"can't be read: {error.strerror}"
        else:
            sha256 = hashlib.sha256(content).digest()
            yield entry, {"square": square, "width": image.width, "height": image.height, "sha256": sha256}


def _add(
    tar: tarfile.TarFile, shard: Shard, entry: Entry, *, square: npt.NDArray[np.uint8], **facts: Any
) -> dict[str, Any]:
    """Appends an image and its class (`.cls`, WebDataset's convention) to the tar; returns the image's index row."""
    content = encode(square, shard.preprocessing)
    offset = _add_member(tar, f"{entry.key}.{shard.preprocessing.suffix}", content)
    _add_member(tar, f"{entry.key}.cls", str(entry.label).encode())
    return {
        "shard": shard.number,
        "offset": offset,
        "size": len(content),
        "crc32": zlib.crc32(content),
        "label": entry.label,
        "key": entry.key,
        "source": entry.path,
        "patient": entry.patient,
        **facts,
    }


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Adds a file that is the same whoever adds it when (TarInfo's owner, mode and time are constants)."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def encode(square: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> bytes:
    """(S, S) uint8 as the bytes to be stored."""
    buffer = io.BytesIO()
    if preprocessing.format == "raw":
        np.save(buffer, square)
    elif preprocessing.format == "jpg":
        Image.fromarray(square).save(buffer, "JPEG", quality=95)
    else:
        Image.fromarray(square).save(buffer, "PNG", compress_type=PNG_STRATEGY)
    return buffer.getvalue()


@dataclass(frozen=True)
class Part:
    """What is known of a finished tar."""

    columns: Columns
    """Its rows of the index; none where no image could be read."""
    sha256: str
    rejected: tuple[tuple[str, str], ...]
    """(path, reason) of the images left out."""


def read_part(shard: Shard) -> Part:
    """The part of the index that `write_tar` left."""
    columns: Columns = load_file(shard.part)
    sha256 = columns.pop("tar_sha256").tobytes().hex()
    rejected = json.loads(columns.pop("rejected").tobytes())
    return Part(columns, sha256, tuple((path, reason) for path, reason in rejected))
