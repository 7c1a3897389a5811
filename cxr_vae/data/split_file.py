"""Which image belongs to which split, as a small CSV: `cxr-vae split` makes it, `cxr-vae shard --split-file` takes it.

A split file has a row an image: `path` (relative to the source folder), `split`, `label` and `patient`. Rows may be
deleted by hand: those images are left out then.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cxr_vae.data.sources import Layout, SourceImage
from cxr_vae.errors import UserError
from cxr_vae.files import naming, write_atomically

COLUMNS = ("path", "split", "label", "patient")
NOT_LISTED = "not in the split file"
HOW_TO_MAKE = "make it with `cxr-vae split SOURCE --out FILE`"
SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SplitFile:
    """What a split file says."""

    path: Path
    images: Mapping[str, SourceImage]
    """By path; sizes are not known."""
    sha256: str
    """Of the file's bytes, hexadecimal."""


def write_split_file(path: Path, images: Iterable[SourceImage]) -> None:
    """Writes a row an image, sorted by path; the same images give the same bytes.

    Raises UserError where the file is there and says something else.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    ordered = sorted(images, key=lambda image: os.fsencode(image.path))
    table.writerows([image.path, image.split, image.label, image.patient] for image in ordered)
    content = text.getvalue().encode(errors="surrogateescape")
    if path.is_dir() or (path.exists() and path.read_bytes() != content):
        state = "is a folder" if path.is_dir() else "is there and says something else"
        raise UserError(f"{path} {state}: name another file with --out, or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise naming(path.parent, error) from None
    write_atomically(path, content)


def read_split_file(path: Path) -> SplitFile:
    """Reads and checks a split file by itself; UserError with the line where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such split file; {HOW_TO_MAKE}")
    content = path.read_bytes()
    images: dict[str, SourceImage] = {}
    # A byte order mark is what a spreadsheet leaves.
    table = csv.DictReader(io.StringIO(content.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    try:
        missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]}: its first line should be {','.join(COLUMNS)}; {HOW_TO_MAKE}"
            )
        for row in table:
            image = _image(path, table.line_num, row)
            if image.path in images:
                raise UserError(f"{path}, line {table.line_num}: {image.path} is listed twice; delete one of its lines")
            images[image.path] = image
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV table ({error}); {HOW_TO_MAKE}") from None
    if not images:
        raise UserError(f"{path} lists no images; {HOW_TO_MAKE}")
    _refuse_shared_patients(path, images.values())
    return SplitFile(path, images, hashlib.sha256(content).hexdigest())


def _image(path: Path, line: int, row: Mapping[str, str | None]) -> SourceImage:
    values = {name: row[name] or "" for name in COLUMNS}
    empty = [name for name, value in values.items() if not value]
    if empty:
        raise UserError(f"{path}, line {line}: {empty[0]} is missing; a line should hold {','.join(COLUMNS)}")
    check_split_name(values["split"], f"{path}, line {line}")
    return SourceImage(values["path"], values["split"], values["label"], 0, values["patient"])


def check_split_name(name: str, where: str) -> None:
    """Raises UserError unless files can be named after a split."""
    if not SPLIT_NAME.fullmatch(name):
        raise UserError(f"{where}: the split {name!r} should be a word of letters, digits and _, such as train")


def _refuse_shared_patients(path: Path, images: Iterable[SourceImage]) -> None:
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for image in images:
        splits[image.patient].add(image.split)
    shared = sorted(patient for patient, names in splits.items() if len(names) > 1)
    if shared:
        names = " and ".join(sorted(splits[shared[0]]))
        more = f" (and {len(shared) - 1} more patients in several splits)" if len(shared) > 1 else ""
        raise UserError(f"{path}: the patient {shared[0]} is in {names}{more}; a patient's images belong in one split")


def apply_split(layout: Layout, file: SplitFile) -> Layout:
    """The layout with the splits and patients of the file; images it doesn't list are among those left out.

    Raises UserError where the file is not one of this source.
    """
    known = {image.path: image for image in layout.images}
    unknown = [path for path in file.images if path not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more of its images" if len(unknown) > 1 else ""
        raise UserError(f"{file.path} lists {unknown[0]}{more}, which {layout.root} doesn't have: {HOW_TO_MAKE}")
    for path, image in file.images.items():
        if image.label != known[path].label:
            raise UserError(
                f"{file.path} says {image.label} of {path}, whose folder says {known[path].label}: they should agree"
            )
    images = tuple(
        replace(file.images[image.path], num_bytes=image.num_bytes)
        for image in layout.images
        if image.path in file.images
    )
    counts = Counter((image.split, image.label) for image in images)
    splits = tuple(sorted({image.split for image in images}))
    classes = tuple(sorted({image.label for image in images}))
    for split in splits:
        for label in classes:
            if not counts[split, label]:
                raise UserError(
                    f"{file.path}: the split {split} has no image of the class {label}; every split needs every class"
                )
    left_out = tuple((image.path, NOT_LISTED) for image in layout.images if image.path not in file.images)
    return Layout(layout.root, splits, classes, images, layout.ignored + left_out)
