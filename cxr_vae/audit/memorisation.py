"""Do generated images lie closer to the training images than new ones would? Tests on distances and neighbours.

Blurred samples lie close to everything, and a test split may be of another distribution. So of the two tests that may
raise the flag one compares a sample's nearest training image with its next ones (`copies_test`), as training images do
that were made alike (`neighbours.likened`), and the other with its nearest held-out image (`matched_share`). Pure
functions of arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln
from scipy.stats import betabinom, mannwhitneyu

FALSE_ALARMS = 0.01
"""How often the flag is raised, at most, for new images of the training distribution: over all tests of an audit."""

LEVEL_OF_A_TEST = FALSE_ALARMS / 4
"""The p-value up to which a test raises the flag (Bonferroni): there are two in each of two spaces."""

NUM_NEAREST = 50
SHARES = (0.001, 0.01, 0.05)
"""Of real training images that lie below the limits a copy is looked for with."""

NUM_PERMUTATIONS = 1999
SHIFTED = 0.05
"""Where training images tell held-out patients from training patients with less than this p-value, they differ."""

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def nearness_ratios(distances: Floats) -> npt.NDArray[np.float64]:
    """(m,) the distance of the nearest over the mean distance of the 50 nearest, from ascending distances (m, K).

    Carlini et al. 2023. Near 0: a copy.
    """
    nearest = distances[:, :NUM_NEAREST].astype(np.float64)
    there = np.isfinite(nearest)
    means = np.where(there, nearest, 0).sum(1) / np.maximum(there.sum(1), 1)
    return np.where(means > 0, nearest[:, 0] / np.where(means > 0, means, 1), 0.0)


@dataclass(frozen=True)
class Limit:
    """One limit for ratios, and how many samples lie below it."""

    share: float
    """Of new images that would lie below, on average."""
    ratio: float
    expected: float
    """Samples below it, if they were new images of the training distribution."""
    found: int
    num_images: int
    """Training images that are nearest to these."""
    p_value: float
    needed: int
    """So many below it would raise the flag; more than there are samples: it never could."""


@dataclass(frozen=True)
class CopiesTest:
    """Whether more samples have a training image all to themselves than new images would."""

    limits: list[Limit]
    num_reference: int
    num_independent: int
    """What the reference images count for, since those of one patient are alike."""

    @property
    def best(self) -> Limit:
        """The limit with the lowest p-value; the one of 1 % where none is low."""
        return min(self.limits, key=lambda limit: (round(limit.p_value, 12), abs(limit.share - 0.01)))

    @property
    def p_value(self) -> float:
        """Of all limits together (Bonferroni)."""
        return min(1.0, self.best.p_value * len(self.limits))


def copies_test(
    ratios: Floats, nearest: Ints, reference: Floats, reference_groups: Ints, level: float, *, each_image_once: bool
) -> CopiesTest:
    """Compares samples' ratios (m,) with those of training images (R,) to other patients' training images.

    A limit is the k-th smallest of the reference. If samples and reference are draws of one distribution, the number of
    samples below it is beta-binomial(m, k, R + 1 - k), whatever that distribution is. Images of a patient are no
    independent draws: R is replaced by R² / Σ c² with c images of each patient (Kish 1965), which errs on the quiet
    side.

    `each_image_once`: of the samples that have the same training image as their `nearest` (m,) one counts. In learned
    features samples that are unlike real images have the same few of these as their nearest, hubs (Radovanović et al.
    2010), and would be taken for copies.
    `level`: p-values of the whole test up to this raise the flag.
    """
    _, counts = np.unique(reference_groups, return_counts=True)
    independent = max(1, int(counts.sum() ** 2 / (counts**2).sum()))
    ordered = np.sort(reference)
    limits = []
    ranks = sorted({max(1, int(share * independent)) for share in SHARES})
    for k in ranks:
        ratio = float(ordered[max(1, int(k * len(ordered) / independent)) - 1])
        below = ratios < ratio
        found, num_images = int(below.sum()), len(np.unique(nearest[below]))
        law = betabinom(len(ratios), k, independent + 1 - k)
        tail = law.pmf(np.arange(len(ratios) + 1))[::-1].cumsum()[::-1]  # of 0, 1, … m or more
        needed = int(np.argmax(np.append(tail, 0) <= level / len(ranks)))
        p_value = min(1.0, float(tail[num_images if each_image_once else found]))
        share = k / (independent + 1)
        limits.append(Limit(share, ratio, len(ratios) * share, found, num_images, p_value, needed))
    return CopiesTest(limits, len(reference), independent)


@dataclass(frozen=True)
class ShareTest:
    """The share of samples closer to training than to held-out images."""

    share: float
    p_value: float
    """Of so large a share, one-sided."""
    two_sided: float


def matched_share(neighbours: Ints, is_held_out: npt.NDArray[np.bool_], sizes: Ints, seed: int) -> ShareTest:
    """The share of samples that lie closer to training than to held-out images, at equal numbers of both.

    `neighbours` (m, K) are the groups (patients) of the nearest of all training and held-out images together;
    `is_held_out` and `sizes` say of each group whether it is held out and how many images it has. A sample's part of
    the share is the chance that its nearest is a training image if there were only as many of these, drawn at random,
    as there are held-out ones: the mean over all such draws, in closed form, so that each training image has its part.

    If patients are exchangeable the share is ½, and the p-value is exact: that of permuting which patients are held out
    (Phipson and Smyth 2010). It takes care of images that are near to many samples and of patients with many images.
    """

    def share(held_out: npt.NDArray[np.bool_]) -> float:
        return float(chances_of_each(neighbours, held_out, sizes).mean())

    rng = np.random.default_rng(seed)
    found = share(is_held_out)
    permuted = np.array([share(rng.permutation(is_held_out)) for _ in range(NUM_PERMUTATIONS)])
    upper = (1 + int((permuted >= found).sum())) / (1 + NUM_PERMUTATIONS)
    lower = (1 + int((permuted <= found).sum())) / (1 + NUM_PERMUTATIONS)
    return ShareTest(found, upper, min(1.0, 2 * min(upper, lower)))


def chances_of_each(neighbours: Ints, is_held_out: npt.NDArray[np.bool_], sizes: Ints) -> npt.NDArray[np.float64]:
    """Each sample's part of the share, (m,); see `matched_share`."""
    is_hit = is_held_out[neighbours]
    num_closer = np.where(is_hit.any(1), is_hit.argmax(1), is_hit.shape[1])
    num_held_out = int(sizes[is_held_out].sum())
    chances = chance_of_a_closer_one(is_hit.shape[1], int(sizes.sum()) - num_held_out, num_held_out)
    return np.asarray(chances[num_closer])


def chance_of_a_closer_one(most: int, num_training: int, num_held_out: int) -> npt.NDArray[np.float64]:
    """For r = 0 … most closer training images: the chance that `num_held_out` of all drawn at random hold one of them.

    1 - C(n - r, h) / C(n, h).
    """
    n, h = num_training, min(num_held_out, num_training)
    others = np.maximum(n - np.arange(most + 1), h)  # fewer would mean certainty
    none = gammaln(others + 1) - gammaln(others - h + 1) - gammaln(n + 1) + gammaln(n - h + 1)
    return np.where(np.arange(most + 1) > n - h, 1.0, 1 - np.exp(none))


def copying_statistic(sample_distances: Floats, held_out_distances: Floats) -> float:
    """C_T of Meehan et al. 2020 with one cell: the Mann-Whitney z-score of samples' and held-out images' distances.

    Well below 0: samples lie closer to the training images than held-out images do, as copies do, and blurred images.
    """
    m, n = len(sample_distances), len(held_out_distances)
    u = mannwhitneyu(sample_distances, held_out_distances).statistic
    return float((u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))


@dataclass(frozen=True)
class Findings:
    """Of one space."""

    space: str
    num_samples: int
    copies: CopiesTest
    share: ShareTest
    share_of_training: ShareTest
    """The same of training images, likened to the samples, whose own patient is left out: without memorisation."""
    p_above_training: float
    """Of a share so far above that one: held-out images may be of a distribution that differs a little."""
    share_below: float
    """Of samples whose nearest training image is closer than that of 99 % of the held-out images."""
    c_t: float

    @property
    def p_share(self) -> float:
        """Both ½ and the share of training images have to be unlikely."""
        return max(self.share.p_value, self.p_above_training)

    @property
    def held_out_differs(self) -> bool:
        """Whether held-out images are of another distribution, so that the share says nothing of memorisation."""
        return self.share_of_training.two_sided < SHIFTED


def verdict(spaces: Sequence[Findings]) -> tuple[bool, str]:
    """Whether the flag is raised, and why in a sentence.

    It is raised where the copies test or, if the held-out images are of the training distribution, the share of a
    space has so low a p-value.
    """
    reasons = []
    for found in spaces:
        best = found.copies.best
        if found.copies.p_value <= LEVEL_OF_A_TEST:
            reasons.append(
                f"in {found.space}, {best.found} samples are nearer to a single training image, one of "
                f"{best.num_images}, than {1 - best.share:.1%} of new images would be, where {best.expected:.1f} were "
                f"expected (p = {found.copies.p_value:.2g})"
            )
        if found.p_share <= LEVEL_OF_A_TEST and not found.held_out_differs:
            reasons.append(
                f"in {found.space}, {found.share.share:.1%} of the samples are closer to training than to as many "
                f"held-out images (p = {found.p_share:.2g})"
            )
    if reasons:
        return True, "; ".join(reasons)
    return False, "samples are no closer to single training images than new images would be"
