"""The duplicates of a shard directory: which, how many, where they reach, and a picture of them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxr_vae.console import counted
from cxr_vae.files import write_atomically
from cxr_vae.inspection.duplicates import CANDIDATE_CORRELATION, NEAR_CORRELATION, equal_groups, near_pairs
from cxr_vae.inspection.findings import Cell, Finding, Part, Table
from cxr_vae.inspection.survey import Survey

KINDS = {"same file": "the same file", "same pixels": "the same pixels in other files", "near": "near copies"}
HARM = {
    "splits": "a test would be of images seen in training",
    "classes": "one of the labels is wrong",
    "patients": "one person under two names?",
}
MAX_LISTED = 10
MAX_PICTURED = 12

SUSPICIOUS = 0.25
"""Near pairs an image, from which it is doubtful that they are copies."""


@dataclass(frozen=True)
class Group:
    """Images that are the same by one of KINDS."""

    kind: str
    members: tuple[int, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    patients: tuple[str, ...]
    correlation: float = 1.0

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """Sorts those first that reach across classes, then splits, then patients."""
        return (len(self.classes) == 1, len(self.splits) == 1, len(self.patients) == 1)


def find_duplicates(images: Survey) -> tuple[list[Group], Part]:
    """All groups, those that matter most first, and what to say of them."""

    def group(kind: str, members: Sequence[int], correlation: float = 1.0) -> Group:
        return Group(
            kind,
            tuple(map(int, members)),
            tuple(sorted({images.splits[images.split[member]] for member in members})),
            tuple(sorted({images.classes[images.label[member]] for member in members})),
            tuple(sorted({str(images.patient[member]) for member in members})),
            correlation,
        )

    groups = [group("same file", members) for members in equal_groups(images.file_hash)]
    same_pixels = equal_groups(images.pixel_hash)
    for members in same_pixels:
        if len({images.file_hash[member].tobytes() for member in members}) > 1:
            groups.append(group("same pixels", members))
    repeated = {member for members in same_pixels for member in members[1:]}
    rows = np.array([row for row in range(len(images)) if row not in repeated], np.int64)
    pairs, least = near_pairs(images.copies[torch.from_numpy(rows)], rows, images.images)
    groups += [group("near", members, correlation) for correlation, *members in pairs]
    groups.sort(key=lambda found: found.rank)
    facts = {
        "duplicates": [
            {"kind": group.kind, "correlation": group.correlation, "images": _members(images, group)}
            for group in groups
        ],
        "near_duplicates_settings": {"correlation_from": NEAR_CORRELATION, "candidates_from": round(least, 4)},
    }
    return groups, Part([_counts(groups), *_listed(images, groups)], _findings(groups, len(images), least), facts)


def _members(images: Survey, group: Group) -> list[dict[str, Any]]:
    return [
        {
            "source": images.source[member],
            "split": images.splits[images.split[member]],
            "row": int(member - images.starts[images.split[member]]),
            "class": images.classes[images.label[member]],
            "patient": str(images.patient[member]),
        }
        for member in group.members
    ]


def _counts(groups: Sequence[Group]) -> Table:
    rows: list[list[Cell]] = []
    for kind in KINDS:
        mine = [group for group in groups if group.kind == kind]
        across = [sum(len(getattr(group, name)) > 1 for group in mine) for name in HARM]
        num_images = len({member for group in mine for member in group.members})
        rows.append([kind, len(mine), num_images, *across])
    headers = ["kind", "groups", "images", "across splits", "across classes", "across patients"]
    return Table("Duplicates", headers, rows)


def _listed(images: Survey, groups: Sequence[Group]) -> list[Table]:
    if not groups:
        return []
    rows: list[list[Cell]] = [
        [group.kind, group.correlation, " ".join(images.source[member] for member in group.members)]
        for group in groups[:MAX_LISTED]
    ]
    title = "Duplicates, those across classes, splits and patients first"
    title += f" ({MAX_LISTED} of {len(groups)}; the JSON file has all)" if len(groups) > MAX_LISTED else ""
    return [Table(title, ["kind", "correlation", "files"], rows)]


def _findings(groups: Sequence[Group], num_images: int, least: float) -> list[Finding]:
    found = []
    for kind, words in KINDS.items():
        mine = [group for group in groups if group.kind == kind]
        if not mine:
            found.append(Finding("ok", f"no two images are {words}"))
            continue
        reach = {name: sum(len(getattr(group, name)) > 1 for group in mine) for name in HARM}
        bad = reach["splits"] or reach["classes"]
        where = [] if bad else ["none across splits or classes"]
        where += [f"{number} of them across {name} ({HARM[name]})" for name, number in reach.items() if number]
        text = f"{counted(len(mine), 'group')} of images that are {words}"
        found.append(Finding("warning" if bad else "note", "; ".join([text, *where])))
    if sum(group.kind == "near" for group in groups) > max(3, SUSPICIOUS * num_images):
        text = "with so many near copies, the images are more likely too smooth or too small to be told apart"
        found.append(Finding("note", text))
    if least > CANDIDATE_CORRELATION:
        text = f"so many images are alike that only pairs whose small copies correlate by {least:.3f} were compared"
        found.append(Finding("note", text))
    return found


def save_pairs(path: Path, images: Survey, groups: Sequence[Group]) -> None:
    """A picture of up to 12 of the groups, two images of each side by side, in PNG format."""
    from matplotlib.figure import Figure  # matplotlib takes a second to import

    shown = _to_show(groups)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * lines), layout="constrained")
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, group in zip(figure.axes, shown, strict=False):
        members = _most_different(images, group)
        pair = images.images(members)[:, 0]
        gap = torch.full((pair.shape[1], max(2, pair.shape[2] // 50)), 255, dtype=torch.uint8)
        axes.imshow(torch.cat([pair[0], gap, pair[1]], dim=1).numpy(), cmap="gray", vmin=0, vmax=255)
        correlation = f", correlation {group.correlation:.3f}" if group.kind == "near" else ""
        names = "\n".join(_shortened(images.source[member]) for member in members)
        axes.set_title(f"{group.kind}{correlation}\n{names}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    write_atomically(path, buffer.getvalue())


def _to_show(groups: Sequence[Group]) -> list[Group]:
    """Some of each kind, those that matter most first; copies of files, which look as one expects, last."""
    near = [group for group in groups if group.kind != "same file" or not all(group.rank)]
    return [*near, *(group for group in groups if group not in near)][:MAX_PICTURED]


def _most_different(images: Survey, group: Group) -> list[int]:
    """Its first image and the one that differs most from it in class, split and patient."""
    first = group.members[0]

    def differences(member: int) -> tuple[bool, ...]:
        columns = (images.label, images.split, images.patient)
        return tuple(bool(column[member] != column[first]) for column in columns)

    return [first, max(group.members[1:], key=differences)]


def _shortened(path: str) -> str:
    return path if len(path) <= 60 else f"{path[:20]}…{path[-39:]}"
