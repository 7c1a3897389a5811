"""The folder of X-rays as the user has it: `split/class/*.jpg|jpeg|png`, as Kaggle lays out chest-xray-pneumonia."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cxr_vae.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
USUAL_SPLITS = ("train", "val", "test")
EXPECTED = "expected SOURCE/split/class/*.jpg|jpeg|png, such as train/NORMAL/IM-0115-0001.jpeg"


@dataclass(frozen=True)
class SourceImage:
    """One image file and what its place says of it."""

    path: str
    """Relative to the source folder."""
    split: str
    label: str
    num_bytes: int
    known_patient: str = ""
    """Where something better than the file's name says who it is."""

    @property
    def patient(self) -> str:
        """The patient's key."""
        return self.known_patient or patient_of(self.path)


@dataclass(frozen=True)
class Layout:
    """What a source folder holds: its images, sorted by path, and all that was left out, with the reason."""

    root: Path
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    images: tuple[SourceImage, ...]
    ignored: tuple[tuple[str, str], ...]


def scan(root: Path, *, every_class: bool = True) -> Layout:
    """Lists the images below `root` without opening them.

    Raises UserError where the folder is missing, isn't laid out by split and class, or, with `every_class`, lacks a
    class in a split.
    """
    if not root.exists():
        raise UserError(f"{root}: no such folder; {EXPECTED}")
    if not root.is_dir():
        raise UserError(f"{root} is a file; {EXPECTED}")
    images: list[SourceImage] = []
    ignored: list[tuple[str, str]] = []
    for entry in _entries(root):
        if not entry.is_dir() or entry.name.startswith((".", "__MACOSX")):
            ignored.append((entry.name, "not a split folder"))
            continue
        found = _scan_split(root, entry.name, ignored)
        images += found
        if not found:
            if any(_is_image(inner.name) for inner in _entries(Path(entry))):
                raise UserError(f"{entry.path} holds images but no class folders; {EXPECTED}")
            if entry.name in USUAL_SPLITS:
                raise UserError(f"{entry.path} holds no images in class folders; {EXPECTED}")
            ignored.append((entry.name, "no images in class folders"))
    if not images:
        nested = next((inner for inner in _entries(root) if inner.is_dir() and (Path(inner) / "train").is_dir()), None)
        hint = f"; did you mean {nested.path}?" if nested else ""
        raise UserError(f"{root} holds no images; {EXPECTED}{hint}")
    images.sort(key=lambda image: os.fsencode(image.path))
    layout = Layout(
        root,
        tuple(sorted({image.split for image in images})),
        tuple(sorted({image.label for image in images})),
        tuple(images),
        tuple(ignored),
    )
    if every_class:
        _refuse_missing_classes(layout)
    return layout


def _scan_split(root: Path, split: str, ignored: list[tuple[str, str]]) -> list[SourceImage]:
    images = []
    for folder in _entries(root / split):
        if not folder.is_dir() or folder.name.startswith("."):
            ignored.append((f"{split}/{folder.name}", "not a class folder"))
            continue
        for file in _entries(Path(folder)):
            path = f"{split}/{folder.name}/{file.name}"
            if file.is_dir():
                ignored.append((path, "a folder inside a class folder"))
            elif not _is_image(file.name) or file.name.startswith("."):
                ignored.append((path, f"not named {'|'.join(IMAGE_SUFFIXES)}"))
            else:
                # A link that leads nowhere counts as an image, so that it is rejected by name later, not overlooked.
                num_bytes = file.stat().st_size if file.is_file() else 0
                images.append(SourceImage(path, split, folder.name, num_bytes))
    return images


def _refuse_missing_classes(layout: Layout) -> None:
    counts = Counter((image.split, image.label) for image in layout.images)
    for split in layout.splits:
        for label in layout.classes:
            if not counts[split, label]:
                folder = layout.root / split / label
                state = "is empty" if folder.is_dir() else "is missing"
                raise UserError(
                    f"{folder} {state}, while other splits have the class {label}: "
                    f"every split needs every class ({', '.join(layout.classes)}); add images of it, or divide the "
                    "folder anew by `cxr-vae split`, whose file `cxr-vae shard --split-file` takes"
                )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except PermissionError:
        raise UserError(f"{folder}: no permission to list this folder") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def patient_of(path: str) -> str:
    """The patient an image file belongs to, from its name.

    In Kaggle's set `person12_bacteria_3` and `person12_virus_9` are, very probably, two people: the two series are
    numbered independently. Normal images carry `IM-0115-…` or `NORMAL2-IM-0115-…`, again two series. Any other file
    is a patient of its own, whose key is the path without suffix: `0001.png` of two folders are two people.
    """
    match = re.match(r"(person\d+_(?:bacteria|virus))_\d+|((?:NORMAL2-)?IM-\d+)-\d+", Path(path).stem)
    return (match.group(1) or match.group(2)) if match else str(Path(path).with_suffix(""))


def keys_of(images: Iterable[SourceImage]) -> list[str]:
    """A WebDataset key an image: `class/stem` in plain ASCII without dots, unique within the split.

    Dots would end a WebDataset key. Names that become equal (`a.jpg` and `a.png`, `a b` and `a_b`) all get a suffix
    from the hash of their path, so that a key never depends on which other file came first.
    """
    images = list(images)
    plain = [_ascii(image.label) + "/" + _ascii(Path(image.path).stem) for image in images]
    counts = Counter((image.split, key) for image, key in zip(images, plain, strict=True))
    return [
        key if counts[image.split, key] == 1 else f"{key}-{hashlib.sha256(os.fsencode(image.path)).hexdigest()[:12]}"
        for image, key in zip(images, plain, strict=True)
    ]


def _ascii(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    # A tar header holds 100 bytes of name; beyond that readers need extensions.
    return cleaned if len(cleaned) <= 40 else cleaned[:27] + "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
