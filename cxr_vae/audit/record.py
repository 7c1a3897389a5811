"""What an audit found, as a record for people and programs, and its closest pairs as a picture."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cxr_vae.audit.memorisation import FALSE_ALARMS, LEVEL_OF_A_TEST, Findings, verdict
from cxr_vae.audit.rows import Rows
from cxr_vae.audit.samples import Samples, in_words
from cxr_vae.config import Config
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import SplitIndex
from cxr_vae.files import keep_earlier, read_json, write_atomically, write_json
from cxr_vae.inspection.findings import Cell, Finding, Part, Table, as_record

RECORD, PICTURE = "memorisation.json", "closest_pairs.png"

PAIRS_SHOWN = 8

RULE = (
    "The flag is raised where a test has p <= {level:.3g}, so that new images of the training distribution raise it at "
    "most {alarms:.0%} of the time: in each space the copies test, in which a training image counts once in features; "
    "and the share of samples closer to training than to held-out images, against half and against that of training "
    "images of other patients, unless the latter show that the held-out ones are of another distribution."
)
DISTANCE = (
    "sqrt(2 - 2 c), 0 to 2; pixels: c is the largest normalised cross-correlation of copies of 32 x 32 pixels over "
    "shifts of up to 2 pixels; features: c is the cosine about the mean of training images"
)


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest training image in one space."""

    space: str
    number: int
    """Of the sample."""
    sample: str
    row: int
    """Of the training image."""
    key: str
    source: str
    patient: str
    distance: float
    ratio: float
    """The distance over the mean of those to the 50 nearest training images; near 0: a copy."""
    is_suspect: bool
    """Where the copies test of this space raises the flag: below its limit. Some of these may be no copies."""


def record_of(
    found: Sequence[Findings],
    pairs: Sequence[Pair],
    circumstances: dict[str, Any],
    indexes: tuple[SplitIndex, SplitIndex],
    rows: Rows,
    config: Config,
) -> dict[str, Any]:
    """The content of memorisation.json."""
    training, held_out = indexes
    flag, reason = verdict(found)
    num_samples = circumstances["num_samples"]
    remarked = [
        *remarks(found, flag, reason, held_out.split, rows.num_left_out, num_samples),
        note(f"Audited: {num_samples} {in_words(circumstances['samples'])}."),
    ]
    return {
        "flag": flag,
        "reason": reason,
        "rule": RULE.format(level=LEVEL_OF_A_TEST, alarms=FALSE_ALARMS),
        "false_alarm_rate": FALSE_ALARMS,
        "level_of_a_test": LEVEL_OF_A_TEST,
        **as_record([Part([summary(found), limits(found), closest(pairs)], remarked)]),
        "pictures": [{"title": "Closest pairs: sample above its nearest training image", "file": PICTURE}],
        "spaces": {
            one.space: asdict(one)
            | {"held_out_differs": one.held_out_differs, "p_copies": one.copies.p_value, "p_share": one.p_share}
            for one in found
        },
        "closest_pairs": [asdict(pair) for pair in pairs],
        **circumstances,
        "training": {"split": training.split, "index_sha256": training.content_hash, "num": len(training)},
        "held_out": {
            "split": held_out.split,
            "index_sha256": held_out.content_hash,
            "num": len(rows.held_out),
            "num_left_out": rows.num_left_out,
        },
        "num_reference": len(rows.reference),
        "distance": DISTANCE,
        "seed": config.seed,
        "image_size": config.data.image_size,
        "versions": {name: version(name) for name in ("cxr-vae", "torch", "torch-fidelity", "numpy", "scipy")},
    }


def summary(found: Sequence[Findings]) -> Table:
    """One row a space."""
    headers = [
        "space",
        "samples nearer to one training image than 99 % of new images, in %",
        "p (copies)",
        "closer to training than to held-out images, in %",
        "p (share)",
        "the same of training images, own patient left out, in %",
        "closer to training than 99 % of held-out images, in %",
        "C_T",
    ]
    rows: list[list[Cell]] = []
    for one in found:
        limit = min(one.copies.limits, key=lambda limit: abs(limit.share - 0.01))
        rows.append(
            [
                one.space,
                percent(limit.found / one.num_samples),
                round_p(one.copies.p_value),
                percent(one.share.share),
                round_p(one.p_share),
                percent(one.share_of_training.share),
                percent(one.share_below),
                round(one.c_t, 2),
            ]
        )
    return Table("Memorisation", headers, rows)


def limits(found: Sequence[Findings]) -> Table:
    """One row a space and limit of the copies test."""
    headers = [
        "space",
        "limit of the ratio",
        "of new images below, in %",
        "expected",
        "found",
        "training images of these",
        "p",
        "raises the flag at",
    ]
    rows: list[list[Cell]] = [
        [
            one.space,
            round(limit.ratio, 4),
            percent(limit.share),
            round(limit.expected, 1),
            limit.found,
            limit.num_images,
            round_p(limit.p_value),
            limit.needed if limit.needed <= one.num_samples else None,
        ]
        for one in found
        for limit in one.copies.limits
    ]
    return Table("Copies: samples with a training image all to themselves", headers, rows)


def closest(pairs: Sequence[Pair]) -> Table:
    """One row a pair."""
    headers = ["space", "sample", "training image", "patient", "distance", "ratio", "suspect"]
    rows: list[list[Cell]] = [
        [
            pair.space,
            pair.sample,
            pair.key,
            pair.patient,
            round(pair.distance, 4),
            round(pair.ratio, 4),
            "yes" if pair.is_suspect else "no",
        ]
        for pair in pairs
    ]
    return Table("Closest pairs", headers, rows)


def remarks(
    found: Sequence[Findings], flag: bool, reason: str, split: str, num_left_out: int, num_samples: int
) -> list[Finding]:
    """What a reader must know, in sentences."""
    sign = "Memorisation" if flag else "No sign of memorisation"
    said = [Finding("warning" if flag else "ok", f"{sign}: {reason}.")]
    for one in found:
        if one.held_out_differs:
            said.append(
                note(
                    f"In {one.space}, the {split} split is of another distribution than the training images: of these, "
                    f"{one.share_of_training.share:.1%} are closer to other training patients than to the {split} "
                    f"split (p = {one.share_of_training.two_sided:.2g}). The samples' share says nothing then, and the "
                    "flag doesn't use it."
                )
            )
        needed = min(limit.needed for limit in one.copies.limits)
        if needed > num_samples:
            said.append(
                note(f"In {one.space}, {num_samples} samples are too few for the copies test to ever speak up.")
            )
        else:
            said.append(note(f"In {one.space}, the copies test speaks up from {needed} of {num_samples} samples on."))
    if num_left_out:
        said.append(note(f"{num_left_out} images of the {split} split were left out: they are of training patients."))
    return said


def in_short(record: dict[str, Any]) -> str:
    """The findings and the figures, for a terminal."""
    lines = [finding["text"] for finding in record["findings"]]
    figures, copies = record["tables"][:2]
    turned = [
        [title, *cells] for title, cells in zip(figures["headers"], zip(*figures["rows"], strict=True), strict=True)
    ]
    return "\n".join([*lines, "", tabulate(turned[1:], turned[0]), "", tabulate(copies["rows"], copies["headers"])])


def note(text: str) -> Finding:
    """A finding that is neither good nor bad."""
    return Finding("note", text)


def percent(share: float) -> float:
    """Of a share, with two decimals."""
    return round(100 * share, 2)


def round_p(p: float) -> float:
    """A p-value with two significant digits."""
    return float(f"{p:.2g}")


def publish(
    folder: Path, record: dict[str, Any], pairs: Sequence[Pair], samples: Samples, training: XrayDataset
) -> None:
    """Writes picture and record into `folder`, the record last; those of an earlier audit are kept beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_earlier_audit(folder)
    save_pairs(folder / PICTURE, pairs, samples, training)
    write_json(folder / RECORD, record)


def save_pairs(path: Path, pairs: Sequence[Pair], samples: Samples, training: XrayDataset) -> None:
    """The first pairs of each space: the sample above its nearest training image; suspects have red names."""
    from matplotlib.figure import Figure  # matplotlib takes a second to import

    spaces = list(dict.fromkeys(pair.space for pair in pairs))
    figure = Figure(figsize=(1.9 * PAIRS_SHOWN, 4.6 * len(spaces)), layout="constrained")
    grid = figure.subplots(2 * len(spaces), PAIRS_SHOWN, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, space in enumerate(spaces):
        shown = [pair for pair in pairs if pair.space == space][:PAIRS_SHOWN]
        for column, pair in enumerate(shown):
            above, below = grid[2 * place][column], grid[2 * place + 1][column]
            above.imshow(samples.at(pair.number).numpy(), cmap="gray", vmin=0, vmax=255)
            below.imshow(training.images([pair.row])[0, 0].numpy(), cmap="gray", vmin=0, vmax=255)
            color = "firebrick" if pair.is_suspect else "black"
            above.set_title(f"{shorten(pair.sample)}\n{space}, ratio {pair.ratio:.2f}", fontsize=8, color=color)
            below.set_title(f"{shorten(pair.key)}\ndistance {pair.distance:.3f}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    write_atomically(path, buffer.getvalue())


def shorten(name: str, most: int = 26) -> str:
    """The end of a long name."""
    return name if len(name) <= most else "…" + name[1 - most :]


def keep_earlier_audit(folder: Path) -> None:
    """Renames the record and picture of an earlier audit to memorisation.1.json, closest_pairs.1.png and so on."""
    record = folder / RECORD
    if not record.is_file():
        return
    content = read_json(record, hint="delete it")
    if picture := keep_earlier(folder / PICTURE):
        content["pictures"][0]["file"] = picture.name
        write_json(record, content)
    keep_earlier(record)
