"""Figures from features: distances between two sets of images, each with an interval.

torch-fidelity's definitions throughout where it has the figure. What is computed here is computed from matrices of all
pairs, in float64, so that the halves of an interval cost little more than the figure itself.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.helpers import get_kwarg
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_poly, kid_features_to_metric, mmd2

from cxr_vae.config import EvaluateConfig
from cxr_vae.errors import UserError
from cxr_vae.evaluation.features import Features

Array = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]

NUM_HALVES = 50
"""Enough to know a standard error to a tenth of itself."""
MIN_IMAGES = 4  # so that a half has two

NEIGHBOURS_PRECISION = 3
"""k of precision and recall: torch-fidelity's, and Kynkäänniemi's et al. 2019."""
NEIGHBOURS_DENSITY = 5
"""k of density and coverage: Naeem's et al. 2020."""

MAX_PAIRS = 10_000
"""Images of a set that figures of all pairs look at: more would take gigabytes."""

MOST_AT_ONCE = 100_000
"""Images that the threads look at together: more would take gigabytes."""

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the images that the extrapolation looks at."""

NAMES = ("frechet", "frechet_infinity", "kernel", "precision", "recall", "density", "coverage", "score")
INCEPTION_NAMES = {
    "frechet": "fid",
    "frechet_infinity": "fid_infinity",
    "kernel": "kid",
    "score": "inception_score",
}
"""What these figures are called with the 2015 Inception weights, and only with them."""


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    value: float
    standard_error: float
    """Of the figure at this number of images. It says nothing of the bias at small N."""

    @property
    def interval_95(self) -> tuple[float, float]:
        """The value ± 1.96 standard errors."""
        return self.value - 1.96 * self.standard_error, self.value + 1.96 * self.standard_error


def called(name: str, network: str) -> str:
    """A figure's name with a feature network: `fid` or `frechet_random`; a plug-in's is that of its function."""
    if network == "inception":
        return INCEPTION_NAMES.get(name, name)
    return f"{name}_{network.rpartition(':')[2]}"


def compare(generated: Features, real: Features, config: EvaluateConfig) -> dict[str, Figure]:
    """All of NAMES that the features allow, of generated images (G, D) against real ones (R, D)."""
    a, b = generated.pooled.numpy().astype(np.float64), real.pooled.numpy().astype(np.float64)
    pairs = Pairs(some(a), some(b))

    def frechet(i: Rows, j: Rows) -> float:
        return frechet_distance(a[i], b[j])

    def extrapolated(i: Rows, j: Rows) -> float:
        return frechet_infinity(a[i], b[j])

    kernel = kernel_distance(generated, real, config.kid_subset_size, pairs)
    _ = pairs.distances  # now: threads that ask at the same time would each compute them
    figures = {
        "frechet": with_interval(frechet, len(a), len(b)),
        "frechet_infinity": with_interval(extrapolated, len(a), len(b), num_halves=NUM_HALVES // 2),
        "kernel": with_interval(pairs.mmd, *pairs.counts, value=kernel),
    }
    for name in ("precision", "recall", "density", "coverage"):
        figures[name] = with_interval(getattr(pairs, name), *pairs.counts)
    if generated.logits is not None:
        figures["score"] = inception_score(generated, config)
    return figures


def frechet_distance(a: Array, b: Array) -> float:
    """‖μ_a - μ_b‖² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features (N, D), in float64.

    Heusel et al. 2017, eq. 6. With A and B the centred features over √(N-1), C_a = AᵀA, and the trace of the root is
    the sum of the singular values of A Bᵀ. A set with more images than dimensions is first reduced by QR, which leaves
    them as they are.
    """
    both = [torch.from_numpy(x).double() for x in (a, b)]
    means = [x.mean(0) for x in both]
    centred = [x - mean for x, mean in zip(both, means, strict=True)]
    traces = sum(float(x.square().sum()) / (len(x) - 1) for x in centred)
    left, right = (torch.linalg.qr(x, mode="r")[1] if len(x) > x.shape[1] else x for x in centred)
    # torch's singular values take two thirds of the time of scipy's.
    root = float(torch.linalg.svdvals(left @ right.T).sum()) / math.sqrt((len(a) - 1) * (len(b) - 1))
    return float((means[0] - means[1]).square().sum()) + traces - 2 * root


def frechet_infinity(a: Array, b: Array) -> float:
    """The Fréchet distance extrapolated to infinitely many images of both sets (N, D), in float64.

    Chong and Forsyth 2020: the distance at N images is nearly linear in 1/N; a straight line through those of random
    parts of the sets gives the value at 1/N = 0. They shrink the generated set only; here both shrink by the same
    share, since the real set is small too. Less biased than the distance, and noisier.
    """
    rng = np.random.default_rng(0)
    parts = [[rng.permutation(len(x))[: max(2, round(share * len(x)))] for x in (a, b)] for share in FRACTIONS]
    distances = [frechet_distance(a[i], b[j]) for i, j in parts]
    return float(np.polynomial.Polynomial.fit(1 / np.array(FRACTIONS), distances, 1)(0))


@dataclass(frozen=True)
class Pairs:
    """Figures that need all pairs of two sets of features (N, D) float64, of all images or of some `i` and `j`."""

    a: Array
    b: Array

    @property
    def counts(self) -> tuple[int, int]:
        """Images of each set."""
        return len(self.a), len(self.b)

    @cached_property
    def kernels(self) -> tuple[Array, Array, Array]:
        """Bińkowski's et al. 2018 kernel (x·y / D + 1)³ within a, within b, and between them."""
        return tuple(kernel_poly(x, y) for x, y in self._pairs)

    @cached_property
    def distances(self) -> tuple[Array, Array, Array]:
        """Euclidean distances within a, within b, and between them."""
        return tuple(in_threads(cdist, *zip(*self._pairs, strict=True), num_images=sum(self.counts)))

    @property
    def _pairs(self) -> tuple[tuple[Array, Array], ...]:
        return ((self.a, self.a), (self.b, self.b), (self.a, self.b))

    def mmd(self, i: Rows, j: Rows) -> float:
        """The kernel distance from all images at once: what torch-fidelity's mean over subsets converges to.

        Gretton et al. 2012, eq. 3, unbiased.
        """
        within_a, within_b, between = self.kernels

        def mean_of_pairs(kernel: Array, rows: Rows) -> float:
            k = kernel[np.ix_(rows, rows)]
            return float((k.sum() - np.trace(k)) / (len(rows) * (len(rows) - 1)))

        return mean_of_pairs(within_a, i) + mean_of_pairs(within_b, j) - 2 * float(between[np.ix_(i, j)].mean())

    def precision(self, i: Rows, j: Rows) -> float:
        """The share of a that lies among b: within the distance of some image of b to its 3rd neighbour in b.

        Kynkäänniemi et al. 2019, eq. 2, with torch-fidelity's k.
        """
        radii = radii_of(self.distances[1], j, NEIGHBOURS_PRECISION)
        return float((self.distances[2][np.ix_(i, j)] <= radii).any(1).mean())

    def recall(self, i: Rows, j: Rows) -> float:
        """The share of b that lies among a."""
        radii = radii_of(self.distances[0], i, NEIGHBOURS_PRECISION)
        return float((self.distances[2][np.ix_(i, j)] <= radii[:, None]).any(0).mean())

    def density(self, i: Rows, j: Rows) -> float:
        """In how many of b's neighbourhoods an image of a lies, over how many are to be expected; may exceed 1.

        Naeem et al. 2020, eq. 4; unlike precision it isn't carried by outliers of b.
        """
        radii = radii_of(self.distances[1], j, NEIGHBOURS_DENSITY)
        return float((self.distances[2][np.ix_(i, j)] < radii).sum(1).mean() / NEIGHBOURS_DENSITY)

    def coverage(self, i: Rows, j: Rows) -> float:
        """The share of b whose neighbourhood holds an image of a; Naeem et al. 2020, eq. 5."""
        radii = radii_of(self.distances[1], j, NEIGHBOURS_DENSITY)
        return float((self.distances[2][np.ix_(i, j)].min(0) < radii).mean())


def some(x: Array) -> Array:
    """At most MAX_PAIRS of the images, drawn at random."""
    return x if len(x) <= MAX_PAIRS else x[np.sort(np.random.default_rng(0).permutation(len(x))[:MAX_PAIRS])]


def radii_of(distances: Array, rows: Rows, neighbours: int) -> Array:
    """Distance of each of `rows` to its k-th neighbour among them, itself not counted; the farthest if they are few."""
    k = min(neighbours, len(rows) - 1)
    return np.partition(distances[np.ix_(rows, rows)], k, axis=1)[:, k]


def kernel_distance(a: Features, b: Features, subset_size: int, pairs: Pairs) -> float:
    """torch-fidelity's kernel distance (Bińkowski et al. 2018): cubic kernel, unbiased, a mean over 100 random subsets.

    Where there are no more images than a subset takes, the one subset is all of them. Where `pairs` holds all images,
    the subsets, which are torch-fidelity's, are looked up there.
    """
    counts = len(a.pooled), len(b.pooled)
    size = min(subset_size, *counts)
    num_subsets = 1 if size == counts[0] == counts[1] else 100
    if pairs.counts == counts:
        rng, (within_a, within_b, between) = np.random.RandomState(get_kwarg("rng_seed", {})), pairs.kernels
        subsets = [[rng.choice(count, size, replace=False) for count in counts] for _ in range(num_subsets)]
        mmds = [mmd2(within_a[np.ix_(i, i)], between[np.ix_(i, j)], within_b[np.ix_(j, j)]) for i, j in subsets]
        return float(np.mean(mmds))
    # In float64: it is a small difference of large sums.
    both = (a.pooled.double(), b.pooled.double())
    figures = kid_features_to_metric(*both, kid_subset_size=size, kid_subsets=num_subsets, verbose=False)
    return float(figures["kernel_inception_distance_mean"])


def inception_score(images: Features, config: EvaluateConfig) -> Figure:
    """torch-fidelity's Inception Score (Salimans et al. 2016): a mean over `is_splits` parts.

    It measures how sure and how varied an ImageNet classifier is: of X-rays that means little. Report, don't optimise.
    """
    logits = images.logits
    assert logits is not None, "a network without classes has no score"
    parts = min(config.is_splits, len(logits) // 2)

    def score(i: Rows, _: Rows) -> float:
        # A half of the images is split into half as many parts: the score depends on the size of a part.
        of_these = max(1, round(parts * len(i) / len(logits)))
        return float(isc_features_to_metric(logits[i], of_these)["inception_score_mean"])

    return with_interval(score, len(logits), len(logits))


def with_interval(
    figure: Callable[[Rows, Rows], float],
    num_a: int,
    num_b: int,
    *,
    value: float | None = None,
    num_halves: int = NUM_HALVES,
) -> Figure:
    """A figure of rows of two sets (or `value` in its place) with the standard error of the delete-half jackknife.

    Shao and Wu 1989; Efron and Tibshirani 1993, ch. 11: the spread of the figure over random halves of both sets
    estimates its standard error on the whole sets. Unlike a bootstrap, halves repeat no image; a repeated image is at
    distance 0 from itself, which shifts kernel distances and everything that counts neighbours.
    """
    rng = np.random.default_rng(0)
    halves = [(half(num_a, rng), half(num_b, rng)) for _ in range(num_halves)]
    whole = [(np.arange(num_a), np.arange(num_b))] if value is None else []  # first: it takes longest
    figures = in_threads(figure, *zip(*whole, *halves, strict=True), num_images=num_a + num_b)
    return Figure(figures[0] if value is None else value, float(np.std(figures[len(whole) :], ddof=1)))


def in_threads(function: Callable[..., Any], *columns: Iterable[Any], num_images: int) -> list[Any]:
    """`function` of each row of `columns`, on all the cores that torch has here.

    Each call has one thread for its linear algebra, so that its result has the same bits on any number of cores.
    """
    cores = torch.get_num_threads()
    at_once = max(1, min(cores, MOST_AT_ONCE // num_images))
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *columns))
    finally:
        torch.set_num_threads(cores)  # what the threads have set holds for those to come, too


def half(num: int, rng: np.random.Generator) -> Rows:
    """A random half of the numbers below `num`, in order."""
    return np.sort(rng.permutation(num)[: num // 2])


def mean_figure(values: Array) -> Figure:
    """The mean of (N,) values that are one an image, with its standard error."""
    return Figure(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def check_counts(num_real: int, num_floor: int, config: EvaluateConfig) -> None:
    """Raises UserError where there are too few images for a figure and its interval, which is made from halves."""
    for num, split in ((num_real, config.real_split), (num_floor, config.floor_split)):
        if num < MIN_IMAGES:
            raise UserError(
                f"{num} images of the {split} split are too few to compare: name a split with {MIN_IMAGES} or more"
            )
    if config.is_splits * 2 > config.num_generated:
        raise UserError(
            f"evaluate.is_splits={config.is_splits} needs at least {config.is_splits * 2} generated images, "
            f"evaluate.num_generated is {config.num_generated}: raise it or lower is_splits"
        )
