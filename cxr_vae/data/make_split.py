"""A patient-disjoint split of a source folder, stratified by class: the work of `cxr-vae split`."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from cxr_vae.console import Progress
from cxr_vae.data.sources import Layout, SourceImage
from cxr_vae.data.split_file import check_split_name
from cxr_vae.errors import UserError
from cxr_vae.files import sha256_of

TEST = "test"
"""The split `--keep-test` keeps."""


@dataclass(frozen=True)
class Division:
    """A source folder's images, divided anew."""

    images: tuple[SourceImage, ...]
    left_out: Mapping[str, int]
    """How many images are in no split, by the reason."""


def parse_fractions(text: str) -> dict[str, float]:
    """`train=0.8,val=0.1,test=0.1` as shares, in that order; UserError where they are none."""
    fractions: dict[str, float] = {}
    expected = "expected such as train=0.8,val=0.1,test=0.1"
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        try:
            fractions[name], known = float(value), name in fractions
        except ValueError:
            raise UserError(f"--fractions {text}: {part!r} is no share; {expected}") from None
        check_split_name(name, f"--fractions {text}")
        if not equals or known or not 0 < fractions[name] <= 1:
            raise UserError(f"--fractions {text}: each split once, with a share above 0 and at most 1; {expected}")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"--fractions {text} add up to {sum(fractions.values()):g}, not 1; {expected}")
    return fractions


def divide(
    layout: Layout, fractions: Mapping[str, float], seed: int, *, drop_duplicates: bool = False, keep_test: bool = False
) -> Division:
    """Divides the images among splits, so that no patient is in two and each class is shared out as `fractions` say.

    A function of names, contents and options alone, whatever the order of the files. With `keep_test` the folder's test
    split stays as it is, and the rest is shared out in the proportion of the other fractions; images outside it of its
    patients are left out. With `drop_duplicates` one of several files with the same bytes is kept, and none if they
    are of several classes. Raises UserError where a split would lack a class.
    """
    kept, rest = _set_test_apart(layout, keep_test)
    fractions = {name: share for name, share in fractions.items() if not (keep_test and name == TEST)}
    if not fractions:
        raise UserError("--keep-test needs a split other than test in --fractions, such as train=0.9,val=0.1")
    left_out: Counter[str] = Counter()
    patients = {image.patient for image in kept}
    left_out["whose patient is in the test split"] = sum(image.patient in patients for image in rest)
    rest = [image for image in rest if image.patient not in patients]
    if drop_duplicates:
        candidates = len(rest)
        rest = _without_copies(layout.root, kept, rest)
        left_out["that are copies of others"] = candidates - len(rest)
    images = [*kept, *_share_out(rest, fractions, seed)]
    counts = Counter((image.split, image.label) for image in images)
    for name in fractions:
        for label in layout.classes:
            if not counts[name, label]:
                raise UserError(
                    f"{layout.root} has too few patients of the class {label} to give the split {name} any: raise its "
                    "share in --fractions, or name fewer splits"
                )
    images.sort(key=lambda image: os.fsencode(image.path))
    return Division(tuple(images), {reason: count for reason, count in left_out.items() if count})


def _set_test_apart(layout: Layout, keep_test: bool) -> tuple[list[SourceImage], list[SourceImage]]:
    if keep_test and TEST not in layout.splits:
        raise UserError(f"{layout.root} has no test split to keep; it has {', '.join(layout.splits)}")
    kept = [image for image in layout.images if keep_test and image.split == TEST]
    return kept, [image for image in layout.images if not (keep_test and image.split == TEST)]


def _without_copies(root: Path, kept: Sequence[SourceImage], rest: Sequence[SourceImage]) -> list[SourceImage]:
    """`rest` without files whose bytes occur in `kept`, earlier in `rest` or, anywhere, in another class."""
    same: defaultdict[str, list[SourceImage]] = defaultdict(list)
    with Progress(len(kept) + len(rest), "compare") as progress:
        for image in (*kept, *rest):
            if (root / image.path).is_file():  # a broken link is left to sharding, which rejects it by name
                same[sha256_of(root / image.path)].append(image)
            progress.advance()
    dropped: set[str] = set()
    tested = {image.path for image in kept}
    for group in same.values():
        several_classes = len({image.label for image in group}) > 1
        ours = [image.path for image in group if image.path not in tested]
        dropped.update(ours if several_classes or len(ours) < len(group) else sorted(ours)[1:])
    return [image for image in rest if image.path not in dropped]


def _share_out(images: Iterable[SourceImage], fractions: Mapping[str, float], seed: int) -> list[SourceImage]:
    """The images with their splits, patient by patient, one class after another."""
    by_patient: defaultdict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        by_patient[image.patient].append(image)
    strata: defaultdict[str, list[str]] = defaultdict(list)
    for patient, group in by_patient.items():
        labels = Counter(image.label for image in group)
        strata[min(labels, key=lambda label: (-labels[label], label))].append(patient)
    split_of: dict[str, str] = {}
    for label, patients in strata.items():
        split_of |= _share_out_class({name: len(by_patient[name]) for name in patients}, fractions, f"{seed}\0{label}")
    return [replace(image, split=split_of[patient]) for patient, group in by_patient.items() for image in group]


def _share_out_class(sizes: Mapping[str, int], fractions: Mapping[str, float], salt: str) -> dict[str, str]:
    """The split of each patient, given how many images each has.

    Patients with many images come first, each to the split that lacks the largest part of its share, so that all
    splits get patients of all sizes and the many with one image even out the rest; chance decides among equals.
    """
    total, whole = sum(sizes.values()), sum(fractions.values())
    targets = {name: total * share / whole for name, share in fractions.items()}
    counts = dict.fromkeys(fractions, 0)
    split_of = {}
    for patient in sorted(sizes, key=lambda name: (-sizes[name], _draw(salt, name))):
        lacking = {name: targets[name] - counts[name] for name in targets}
        fitting = [name for name in targets if sizes[patient] < lacking[name] + 1]
        fitting = fitting or [max(targets, key=lambda name: lacking[name])]
        split = max(fitting, key=lambda name: (lacking[name] / targets[name], _draw(salt, patient + "\0" + name)))
        split_of[patient] = split
        counts[split] += sizes[patient]
    return split_of


def _draw(salt: str, name: str) -> bytes:
    """A random number that depends on its names only."""
    return hashlib.sha256(os.fsencode(f"{salt}\0{name}")).digest()


def describe(division: Division) -> str:
    """Images and patients of each split and class, and how many images were left out why, as text."""
    counts = Counter((image.split, image.label) for image in division.images)
    totals = Counter(image.label for image in division.images)
    patients: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for image in division.images:
        patients[image.split, image.label][image.patient] += 1
    rows = [
        [split, label, count, f"{100 * count / totals[label]:.1f} %", len(found), max(found.values())]
        for (split, label), count in sorted(counts.items())
        for found in [patients[split, label]]
    ]
    headers = ["split", "class", "images", "of the class", "patients", "most images of one"]
    lines = [tabulate(rows, headers, colalign=("left", "left", "right", "right", "right", "right"))]
    lines += ["", *(f"left out: {count} images {reason}" for reason, count in division.left_out.items())]
    return "\n".join(lines).rstrip()
