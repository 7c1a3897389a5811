"""Has the model learnt its training images by heart? `cxr-vae audit`: generated against training and held-out images.

Every rank describes its part of the images and searches its part of the training images; the first rank does the
tests and writes `memorisation.json` last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import mannwhitneyu

from cxr_vae.audit.fingerprints import Fingerprints, SplitFingerprints, fingerprint, join
from cxr_vae.audit.memorisation import (
    LEVEL_OF_A_TEST,
    Findings,
    ShareTest,
    chances_of_each,
    copies_test,
    copying_statistic,
    matched_share,
    nearness_ratios,
)
from cxr_vae.audit.neighbours import Neighbours, merge
from cxr_vae.audit.record import Pair, publish, record_of
from cxr_vae.audit.rows import Rows, choose_rows
from cxr_vae.audit.samples import Samples, choose_samples
from cxr_vae.audit.search import Found, for_share, search_all
from cxr_vae.config import Config
from cxr_vae.config_file import PRIOR_OPTIONS, override_config
from cxr_vae.console import Progress
from cxr_vae.data.dataset import open_split
from cxr_vae.data.index import SplitIndex
from cxr_vae.distributed import World, world
from cxr_vae.errors import UserError
from cxr_vae.evaluation.features import FeatureNetwork, choose_network, load_network
from cxr_vae.evaluation.image_sets import usable_cache
from cxr_vae.noise import BLOCK
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.generate import my_blocks

MAY_OVERRIDE = ("evaluate", *PRIOR_OPTIONS, "device", "data.shards", "data.split_file")
NUM_LISTED = 24
MOST_LISTED = 200


def audit(
    run: RunDir,
    overrides: Sequence[str] = (),
    *,
    images: Path | None = None,
    held_out: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Audits a run's samples, or the PNGs in `images`; returns the content of memorisation.json, which it writes.

    `held_out` names the split to compare with (default: evaluate.real_split), `out` another folder than the run's
    `evaluation`. Raises UserError where there are too few images to tell anything, or what is needed is missing.
    """
    config = override_config(run.saved_config(), overrides, MAY_OVERRIDE)
    with world(config.device) as here:
        indexes = open_splits(config, held_out)
        rows = choose_rows(*indexes, config.seed)
        samples = choose_samples(run, config, images, here)
        name = here.broadcast(choose_network(config.evaluate.features) if here.is_main else None)
        network = load_network(name, here.device, config.evaluate.features_weights)
        of_samples = describe(samples, network, here)
        cache = here.broadcast(usable_cache(run) if here.is_main else None)
        training, others = (SplitFingerprints(index, network, cache) for index in indexes)
        training.prepare(here)
        others.prepare(here)
        found = search_all(of_samples, training, others, rows, here)
        if not here.is_main:
            return {}
        findings = [findings_of(one, rows, config.seed) for one in found]
        pairs = [
            pair
            for one, judged in zip(found, findings, strict=True)
            for pair in closest_pairs(one, judged, samples, indexes[0])
        ]
        facts = {"num_samples": len(samples.names), "samples": samples.facts, "features": network.facts()}
        record = record_of(findings, pairs, facts, indexes, rows, config)
        publish(out or run.evaluation, record, pairs, samples, training.dataset)
    return record


def open_splits(config: Config, held_out: str | None) -> tuple[SplitIndex, SplitIndex]:
    """The split the model was trained on and the one to compare with; UserError where they are one."""
    name = held_out or config.evaluate.real_split
    if name == config.data.train_split:
        raise UserError(f"the {name} split is what the model was trained on: name another with --held-out")
    return open_split(config.data, config.data.train_split), open_split(config.data, name)


def describe(samples: Samples, network: FeatureNetwork, here: World) -> Fingerprints:
    """Fingerprints of all samples, on every rank; each made by one of them."""
    num = len(samples.names)
    mine = []
    with Progress(num, "describe samples", enabled=here.is_main) as progress:
        for start in my_blocks(num, here):
            mine.append(fingerprint(samples.fetch(start, min(start + BLOCK, num)), network))
            progress.advance(len(mine[-1].small) * here.size)
    whole = join([part for rank in here.all_gather(mine) for part in rank])
    assert len(whole.small) == num, "a sample was missed or counted twice"
    return whole


def findings_of(found: Found, rows: Rows, seed: int) -> Findings:
    """The tests of one space."""
    sample_distances, held_out_distances = found.samples.distances[:, 0], found.held_out.distances[:, 0]
    share, of_each = share_test(found.samples, found.samples_in_held_out, rows, seed)
    reference = found.reference.of(for_share(rows))
    of_training, of_each_in_training = share_test(reference, found.reference_in_held_out, rows, seed)
    return Findings(
        space=found.space.name,
        num_samples=len(sample_distances),
        copies=copies_test(
            nearness_ratios(found.samples.distances),
            found.samples.ids[:, 0],
            nearness_ratios(found.reference.distances),
            rows.groups[rows.reference],
            LEVEL_OF_A_TEST,
            each_image_once=found.space.is_learned,
        ),
        share=share,
        share_of_training=of_training,
        p_above_training=float(mannwhitneyu(of_each, of_each_in_training, alternative="greater").pvalue),
        share_below=float((sample_distances < np.quantile(held_out_distances, 0.01)).mean()),
        c_t=copying_statistic(sample_distances, held_out_distances),
    )


def share_test(
    in_training: Neighbours, in_held_out: Neighbours, rows: Rows, seed: int
) -> tuple[ShareTest, npt.NDArray[np.float64]]:
    """`matched_share`, and each one's part of it, of images whose neighbours in both sets are known."""
    num = len(rows.groups)
    held_out = Neighbours(in_held_out.distances, in_held_out.ids + num)
    both = merge([in_training, held_out], in_training.ids.shape[1])
    # Where the own patient was left out, there may be fewer.
    ids = both.ids[:, : int(np.isfinite(both.distances).sum(1).min())]
    groups = np.concatenate([rows.groups, rows.held_groups[rows.held_out]])
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    is_held_out = np.zeros(len(sizes), np.bool_)
    is_held_out[groups[num:]] = True
    return matched_share(groups[ids], is_held_out, sizes, seed), chances_of_each(groups[ids], is_held_out, sizes)


def closest_pairs(found: Found, judged: Findings, samples: Samples, training: SplitIndex) -> list[Pair]:
    """The samples that most have a training image to themselves, first the most; 24, or all suspects up to 200."""
    ratios = nearness_ratios(found.samples.distances)
    limit = judged.copies.best
    is_alarm = judged.copies.p_value <= LEVEL_OF_A_TEST
    order = np.argsort(ratios, kind="stable")[: min(MOST_LISTED, max(NUM_LISTED, limit.found))]
    rows = [int(row) for row in found.samples.ids[order, 0]]
    keys, sources, patients = (training.texts(name, rows) for name in ("key", "source", "patient"))
    return [
        Pair(
            space=found.space.name,
            number=int(number),
            sample=samples.names[number],
            row=rows[place],
            key=keys[place],
            source=sources[place],
            patient=patients[place],
            distance=float(found.samples.distances[number, 0]),
            ratio=float(ratios[number]),
            is_suspect=is_alarm and bool(ratios[number] < limit.ratio),
        )
        for place, number in enumerate(order)
    ]
