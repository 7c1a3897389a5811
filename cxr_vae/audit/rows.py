"""Which real images an audit compares with: patients kept apart, held-out images of training patients left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cxr_vae.data.index import SplitIndex
from cxr_vae.errors import UserError

MAX_REFERENCE = 2000
"""Training images whose own nearest training images are looked for."""
MAX_HELD_OUT = 2000
MIN_IMAGES = 16

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The real images that take part."""

    groups: Ints
    """The patient of each training image, as a number."""
    held_groups: Ints
    """The patient of each image of the held-out split."""
    reference: Ints
    """Rows of training images whose own neighbours are looked for."""
    held_out: Ints
    """Rows of the held-out images that take part: at most as many as there are training images."""
    num_left_out: int
    """Held-out images left out as being of a training patient, or the same file."""


def choose_rows(training: SplitIndex, held_out: SplitIndex, seed: int) -> Rows:
    """Chooses up to 2,000 reference and 2,000 held-out images, by `seed`; UserError where there are too few."""
    rng = np.random.default_rng(seed)
    patients = training.texts("patient") + held_out.texts("patient")
    groups = same_person(patients, np.concatenate([training.numbers("sha256"), held_out.numbers("sha256")]))
    groups, held_groups = groups[: len(training)], groups[len(training) :]
    free = np.flatnonzero(~np.isin(held_groups, groups))
    for num, index, what in ((len(training), training, ""), (len(free), held_out, " of other patients")):
        if num < MIN_IMAGES:
            raise UserError(
                f"the {index.split} split of {index.directory} has {num} images{what}, and an audit needs at least "
                f"{MIN_IMAGES}: name another with {'data.shards' if index is training else '--held-out'}"
            )
    return Rows(
        groups,
        held_groups,
        some(np.arange(len(training)), MAX_REFERENCE, rng),
        some(free, min(MAX_HELD_OUT, len(training)), rng),
        len(held_out) - len(free),
    )


def some(rows: Ints, most: int, rng: np.random.Generator) -> Ints:
    """At most `most` of these rows, ascending."""
    return np.sort(rng.permutation(rows)[:most])


def same_person(patients: Sequence[str], sha256: npt.NDArray[Any]) -> Ints:
    """(N,) a number for each person: images of one patient, or with equal files (N, 32), have the same.

    A file that lies under two patients makes them one, since nobody can say whose it is.
    """
    _, by_patient = np.unique(np.asarray(patients), return_inverse=True)
    _, by_content = np.unique(np.ascontiguousarray(sha256).view("S32")[:, 0], return_inverse=True)
    start = by_patient.max() + 1
    size = start + by_content.max() + 1
    links = coo_array((np.ones(len(patients)), (by_patient, start + by_content)), shape=(size, size))
    labels: npt.NDArray[np.int32] = connected_components(links, directed=False)[1]
    return labels[by_patient].astype(np.int64)
