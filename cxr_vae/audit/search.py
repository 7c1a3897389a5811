"""Looks for the nearest real images of everything an audit compares, on one or more ranks."""

from typing import NamedTuple

import numpy as np

from cxr_vae.audit.fingerprints import Fingerprints, SplitFingerprints, join
from cxr_vae.audit.memorisation import NUM_NEAREST
from cxr_vae.audit.neighbours import Neighbours, Search, Space, feature_space, likened, merge, pixel_space
from cxr_vae.audit.rows import Ints, Rows
from cxr_vae.console import Progress
from cxr_vae.distributed import World
from cxr_vae.noise import BLOCK

BLOCKS_AT_ONCE = 64
"""So many that shifting what is looked for, once for each of these, takes little of the time."""

NUM_FOR_SHARE = 500
"""Training images whose share closer to other training patients is found."""


class Found(NamedTuple):
    """What the searches of one space found: neighbours in the training images, and in the held-out ones."""

    space: Space
    samples: Neighbours
    reference: Neighbours
    """Of training images `likened` to the samples."""
    held_out: Neighbours
    samples_in_held_out: Neighbours
    reference_in_held_out: Neighbours
    """Of `for_share` of the reference images only."""


def search_all(
    samples: Fingerprints, training: SplitFingerprints, others: SplitFingerprints, rows: Rows, here: World
) -> list[Found]:
    """Looks for the neighbours in both spaces, each rank in its blocks of the training images.

    The result is on the first rank; the others get an empty list.
    """
    untouched, held_out = training.rows(rows.reference), others.rows(rows.held_out)
    reference = likened(untouched, samples)
    queries = join([samples, reference, held_out])
    groups = np.concatenate(
        [np.full(len(samples.small), -1), rows.groups[rows.reference], rows.held_groups[rows.held_out]]
    )
    spaces = (pixel_space(), feature_space(untouched.pooled.mean(0)))
    keep = num_to_keep(len(training), len(rows.held_out))
    searches = [Search(space, queries, groups, keep, here.device) for space in spaces]
    first, last = here.slice(0, training.num_blocks)
    with Progress(last - first, "search training images", unit="blocks", enabled=here.is_main) as progress:
        for start in range(first, last, BLOCKS_AT_ONCE):
            stop = min(start + BLOCKS_AT_ONCE, last)
            images = join([training.block(number) for number in range(start, stop)])
            groups_there = rows.groups[start * BLOCK :][: len(images.small)]
            for search in searches:
                search.look_at(images, groups_there, start * BLOCK)
            progress.advance(stop - start)
    gathered = here.all_gather([search.found() for search in searches])
    if not here.is_main:
        return []
    found = []
    ends = np.cumsum([len(samples.small), len(reference.small)])
    chosen = Fingerprints(*(whole[for_share(rows)] for whole in reference))
    few = min(keep, len(held_out.small))
    for place, space in enumerate(spaces):
        nearest = merge([rank[place] for rank in gathered], keep)
        found.append(
            Found(
                space,
                samples=nearest.of(slice(0, ends[0])),
                reference=nearest.of(slice(ends[0], ends[1])),
                held_out=nearest.of(slice(ends[1], None)),
                samples_in_held_out=search_one(space, samples, held_out, few, here),
                reference_in_held_out=search_one(space, chosen, held_out, few, here),
            )
        )
    return found


def search_one(space: Space, images: Fingerprints, among: Fingerprints, keep: int, here: World) -> Neighbours:
    """The neighbours of images in a set that is in memory."""
    search = Search(space, images, np.full(len(images.small), -1), keep, here.device)
    search.look_at(among, np.full(len(among.small), -2), 0)
    return search.found()


def num_to_keep(num_training: int, num_held_out: int) -> int:
    """Neighbours a search keeps: so many that nearly always one of them would be held out if it were among them."""
    return min(num_training, max(NUM_NEAREST, 8 * -(-num_training // num_held_out)))


def for_share(rows: Rows) -> Ints:
    """Places of up to 500 of the reference images."""
    num = len(rows.reference)
    return np.linspace(0, num - 1, min(num, NUM_FOR_SHARE)).astype(np.int64)
