"""What is to be known of a data set before figures on it are believed: `cxr-vae inspect`."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxr_vae import __version__
from cxr_vae.console import counted
from cxr_vae.data.images import colour_mode
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.sources import patient_of
from cxr_vae.errors import UserError
from cxr_vae.inspection.duplicate_list import find_duplicates, save_pairs
from cxr_vae.inspection.findings import Cell, Finding, Part, Table, as_record, as_text
from cxr_vae.inspection.survey import Survey, survey

RECORD, PICTURE = "inspection.json", "inspection_duplicates.png"
FORMAT_VERSION = 1

FEW_IMAGES = 100
"""A split with fewer is too small to compare models by."""

TELLING_AUC = 0.7
"""From which a single number of an original counts as a shortcut to its class."""

TELLING_SHARE = 0.1
"""From which a difference of shares between classes does."""

MIN_BORDER = 0.02
"""Of the side: narrower constant borders aren't counted."""


def inspect_shards(path: Path, source: Path | None = None, workers: int | None = None) -> tuple[str, dict[str, Any]]:
    """Inspects a finished shard directory; returns the text for the terminal and the content of RECORD.

    `source`, the folder the shards were made from, tells how many channels the originals had. The picture of
    duplicates is written to the directory. Raises UserError where shards are damaged or the source is another.
    """
    directory = ShardDirectory.open(path)
    images = survey(directory, workers)
    groups, duplicates = find_duplicates(images)
    parts = [
        counts(images),
        patients(images),
        sizes(images, str(directory.manifest["fit"])),
        channels(images, source),
        borders(images, directory.split(images.splits[0]).image_size),
        duplicates,
    ]
    pictures = [{"title": "Duplicates, those across classes, splits and patients first", "file": PICTURE}]
    if groups:
        save_pairs(path / PICTURE, images, groups)
    else:
        (path / PICTURE).unlink(missing_ok=True)  # of an earlier inspection
    record = {
        "format_version": FORMAT_VERSION,
        "index_hashes": {name: split["index"]["sha256"] for name, split in directory.manifest["splits"].items()},
        "versions": {"cxr_vae": __version__},
        **as_record(parts),
        "pictures": pictures if groups else [],
    }
    return as_text(parts), record


def counts(images: Survey) -> Part:
    """Images and patients of each split and class."""
    rows: list[list[Cell]] = []
    for split, label, numbers in images.groups():
        patients = Counter(images.patient[numbers].tolist())
        name, most = max(patients.items(), key=lambda item: item[1])
        rows.append([split, label, len(numbers), len(patients), most, name])
    headers = ["split", "class", "images", "patients", "most of one", "who"]
    findings = []
    for number, split in enumerate(images.splits):
        count = int((images.split == number).sum())
        if count < FEW_IMAGES:
            text = f"{split} has {counted(count, 'image')}, too few to compare models by"
            findings.append(Finding("warning", f"{text}; `cxr-vae split` makes a larger one"))
    shares = {
        label: [float((images.label[images.split == place] == number).mean()) for place in range(len(images.splits))]
        for number, label in enumerate(images.classes)
    }
    label = max(shares, key=lambda name: max(shares[name]) - min(shares[name]))
    if max(shares[label]) - min(shares[label]) >= TELLING_SHARE:
        where = ", ".join(f"{share:.0%} of {split}" for share, split in zip(shares[label], images.splits, strict=True))
        findings.append(Finding("note", f"the share of the class {label} differs between splits: {where}"))
    return Part([Table("Images", headers, rows)], findings)


def patients(images: Survey) -> Part:
    """Patients whose images are in several splits."""
    places: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for patient, split in zip(images.patient.tolist(), images.split, strict=True):
        places[patient][images.splits[split]] += 1
    unnamed = all(patient_of(source) == str(Path(source).with_suffix("")) for source in images.source)
    if unnamed and len(places) == len(images):
        text = "no file name says who the patient is, so each image counts as a patient of its own"
        return Part(findings=[Finding("note", text)], facts={"patients_across_splits": {}})
    shared = {patient: dict(found) for patient, found in sorted(places.items()) if len(found) > 1}
    facts = {"patients_across_splits": shared}
    if not shared:
        return Part(findings=[Finding("ok", "no patient is in more than one split")], facts=facts)
    total = sum(sum(found.values()) for found in shared.values())
    text = (
        f"{counted(len(shared), 'patient is', 'patients are')} in more than one split, with {counted(total, 'image')} "
        f"({next(iter(shared))} first): a test would be of people seen in training; `cxr-vae split` makes a split "
        "without them"
    )
    rows: list[list[Cell]] = [
        [patient, *(found.get(split, 0) for split in images.splits)] for patient, found in [*shared.items()][:20]
    ]
    title = "Patients in several splits" + (f" (20 of {len(shared)})" if len(shared) > 20 else "")
    return Part([Table(title, ["patient", *images.splits], rows)], [Finding("warning", text)], facts)


def sizes(images: Survey, fit: str) -> Part:
    """Sizes and aspect ratios of the originals, and how well they give the class away."""
    aspect = images.width / images.height
    rows: list[list[Cell]] = []
    for split, label, numbers in images.groups():
        row: list[Cell] = [split, label]
        for values, digits in ((images.width, 0), (images.height, 0), (aspect, 3)):
            low, middle, high = np.percentile(values[numbers], (0, 50, 100))
            row.append(f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f}")
        rows.append(row)
    headers = ["split", "class", "width", "height", "width / height"]
    table = Table("Originals: minimum / median / maximum", headers, rows)
    if len(np.unique(np.stack([images.width, images.height]), axis=1).T) == 1:
        size = f"{images.width[0]} x {images.height[0]}"
        text = f"all originals are {size} pixels: they were resized before, and what shape they had isn't known"
        return Part([table], [Finding("note", text)])
    findings = []
    how = {
        "stretch": "fit=stretch turns it into distortion, which a model can see",
        "letterbox": "fit=letterbox turns it into bars, which a model can see",
    }
    for name, values in (("shape (width / height)", aspect), ("number of pixels", images.width * images.height)):
        label, auc = most_telling(images, values)
        if max(auc, 1 - auc) < TELLING_AUC:
            findings.append(
                Finding("ok", f"the {name} of an original says little of its class (AUC {max(auc, 1 - auc):.2f})")
            )
            continue
        visible = how.get(fit, "fit=crop hides most of it") if name.startswith("shape") else "resizing hides most of it"
        text = (
            f"the {name} of an original alone tells {label} from the rest with AUC {max(auc, 1 - auc):.2f}; {visible}"
        )
        findings.append(Finding("warning" if name.startswith("shape") and fit in how else "note", text))
    return Part([table], findings)


def most_telling(images: Survey, values: npt.NDArray[Any]) -> tuple[str, float]:
    """The class that `values` (N,) tell best from the rest, and the area under the ROC curve (0.5: not at all)."""
    from scipy.stats import mannwhitneyu  # takes a while to import

    best = ("any class", 0.5)
    for number, label in enumerate(images.classes):
        mine = images.label == number
        if mine.any() and not mine.all():
            pairs_won = mannwhitneyu(values[mine], values[~mine], method="asymptotic").statistic
            auc = float(pairs_won / (mine.sum() * (~mine).sum()))
            best = max(best, (label, auc), key=lambda found: abs(found[1] - 0.5))
    return best


def channels(images: Survey, source: Path | None) -> Part:
    """Grey or colour originals by class: the shards are grey, so only the source can tell."""
    if source is None:
        text = "whether originals were colour isn't kept in shards, which are all grey: --source FOLDER looks at them"
        return Part(findings=[Finding("note", text)])
    modes = []
    for name in images.source:
        mode = colour_mode(source / name)
        if mode is None:
            raise UserError(
                f"{source / name} is no readable image, though {name} is in the shards: name their source folder"
            )
        modes.append(mode)
    found = np.array(modes)
    kinds = sorted(set(modes))
    rows: list[list[Cell]] = [
        [split, label, *(int((found[numbers] == kind).sum()) for kind in kinds)]
        for split, label, numbers in images.groups()
    ]
    table = Table("Originals: channels, as PIL names them (L: grey)", ["split", "class", *kinds], rows)
    shares = {
        label: [float((found[images.label == n] == kind).mean()) for kind in kinds]
        for n, label in enumerate(images.classes)
    }
    spread = [max(column) - min(column) for column in zip(*shares.values(), strict=True)]
    kind = kinds[int(np.argmax(spread))]
    if not max(spread):
        return Part([table], [Finding("ok", "the number of channels of an original says nothing of its class")])
    where = ", ".join(f"{share[kinds.index(kind)]:.1%} of {label}" for label, share in shares.items())
    text = f"originals of the mode {kind} are {where}: the number of channels tells of the class"
    return Part([table], [Finding("note", f"{text}; the shards, all grey, don't")])


def borders(images: Survey, image_size: int) -> Part:
    """Constant borders of the stored images by class."""
    wide = images.borders >= max(2, round(MIN_BORDER * image_size))
    upright, sideways = wide[:, 0] | wide[:, 1], wide[:, 2] | wide[:, 3]
    bordered = upright | sideways
    rows: list[list[Cell]] = []
    for split, label, numbers in images.groups():
        shares = [f"{100 * float(part[numbers].mean()):.1f} %" for part in (bordered, upright, sideways)]
        mine = images.borders[numbers][bordered[numbers]]
        rows.append([split, label, *shares, float(np.median(mine.max(1))) if len(mine) else None])
    headers = ["split", "class", "with borders", "top or bottom", "left or right", "median width"]
    table = Table(
        f"Constant borders of at least {MIN_BORDER:.0%} of the side, in pixels of {image_size}", headers, rows
    )
    shares_of = {label: float(np.mean(bordered[images.label == n])) for n, label in enumerate(images.classes)}
    where = ", ".join(f"{share:.1%} of {label}" for label, share in shares_of.items())
    spread = max(shares_of.values()) - min(shares_of.values())
    if spread >= TELLING_SHARE:
        return Part([table], [Finding("warning", f"constant borders are on {where}: a model can tell classes by them")])
    if max(shares_of.values()):
        return Part([table], [Finding("note", f"constant borders are on {where}")])
    return Part([table], [Finding("ok", "no image has a constant border")])
