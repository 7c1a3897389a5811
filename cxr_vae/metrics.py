"""Figures from features: Fréchet distance, kernel distance, Inception Score, each with an interval.

torch-fidelity's definitions throughout; only the Fréchet distance is computed here, in the form that is exact and ten
times faster where there are fewer images than feature dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import qr, svdvals
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from cxr_vae.config import EvaluateConfig
from cxr_vae.errors import UserError
from cxr_vae.features import Features

NUM_HALVES = 100
MIN_IMAGES = 4  # so that a half has two
NAMES = {"inception": ("fid", "kid", "inception_score"), "random": ("frechet_random", "kernel_random", "score_random")}
"""Names of Fréchet distance, kernel distance and score: only the first network's may be called FID, KID and IS."""


def frechet_distance(a: npt.NDArray[np.floating[Any]], b: npt.NDArray[np.floating[Any]]) -> float:
    """‖μ_a - μ_b‖² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features (N, D), in float64.

    Heusel et al. 2017, eq. 6. With A and B the centred features over √(N-1), C_a = AᵀA, and the trace of the root is
    the sum of the singular values of A Bᵀ. A set with more images than dimensions is first reduced by QR, which leaves
    them as they are.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = a.mean(0) - b.mean(0)
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    traces = sum(float((x**2).sum()) for x in centred)
    left, right = (qr(x, mode="r")[0][: x.shape[1]] if len(x) > x.shape[1] else x for x in centred)
    return float(difference @ difference + traces - 2 * svdvals(left @ right.T).sum())


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    value: float
    interval_95: tuple[float, float]
    """For the figure at this number of images: value ± 1.96 standard errors. It says nothing of the bias at small N."""


def compare(generated: Features, real: Features, config: EvaluateConfig) -> tuple[Figure, Figure, Figure]:
    """Fréchet distance and kernel distance between two sets, Inception Score of the first."""

    def frechet(a: Features, b: Features) -> float:
        return frechet_distance(a.pooled.numpy(), b.pooled.numpy())

    def kernel(a: Features, b: Features) -> float:
        return unbiased_mmd(a.pooled.numpy(), b.pooled.numpy())

    return (
        with_interval(frechet, generated, real),
        with_interval(kernel, generated, real, value=kernel_distance(generated, real, config.kid_subset_size)),
        inception_score(generated, config),
    )


def kernel_distance(a: Features, b: Features, subset_size: int) -> float:
    """torch-fidelity's kernel distance (Bińkowski et al. 2018): cubic kernel, unbiased, a mean over 100 random subsets.

    Where there are no more images than a subset takes, the one subset is all of them.
    """
    size = min(subset_size, len(a.pooled), len(b.pooled))
    num_subsets = 1 if size == len(a.pooled) == len(b.pooled) else 100
    figures = kid_features_to_metric(a.pooled, b.pooled, kid_subset_size=size, kid_subsets=num_subsets, verbose=False)
    return float(figures["kernel_inception_distance_mean"])


def unbiased_mmd(a: npt.NDArray[np.floating[Any]], b: npt.NDArray[np.floating[Any]]) -> float:
    """The same distance from all images at once, of sets of any two sizes: what the mean over subsets converges to.

    Gretton et al. 2012, eq. 3, with Bińkowski's kernel (x·y / D + 1)³.
    """

    def kernel(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        products: npt.NDArray[np.float64] = x.astype(np.float64) @ y.astype(np.float64).T
        k: npt.NDArray[np.float64] = (products / x.shape[1] + 1) ** 3
        return k

    def mean_of_pairs(x: npt.NDArray[Any]) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * float(kernel(a, b).mean())


def inception_score(images: Features, config: EvaluateConfig) -> Figure:
    """torch-fidelity's Inception Score (Salimans et al. 2016): a mean over `is_splits` parts.

    It measures how sure and how varied an ImageNet classifier is: of X-rays that means little. Report, don't optimise.
    """

    total = len(images.logits)
    parts = min(config.is_splits, total // 2)

    def score(of: Features, _: Features) -> float:
        # A half of the images is split into half as many parts: the score depends on the size of a part.
        of_these = max(1, round(parts * len(of.logits) / total))
        return float(isc_features_to_metric(of.logits, of_these)["inception_score_mean"])

    return with_interval(score, images, images)


def with_interval(
    figure: Callable[[Features, Features], float],
    generated: Features,
    real: Features,
    *,
    value: float | None = None,
    num_halves: int = NUM_HALVES,
) -> Figure:
    """A figure (or `value` in its place) with the 95 % interval of the delete-half jackknife.

    Shao and Wu 1989; Efron and Tibshirani 1993, ch. 11: the spread of the figure over random halves of both sets
    estimates its standard error on the whole sets. Unlike a bootstrap, halves repeat no image; a repeated image is at
    distance 0 from itself, which shifts kernel distances.
    """
    rng = np.random.default_rng(0)
    error = float(np.std([figure(half(generated, rng), half(real, rng)) for _ in range(num_halves)], ddof=1))
    value = figure(generated, real) if value is None else value
    return Figure(value, (value - 1.96 * error, value + 1.96 * error))


def half(features: Features, rng: np.random.Generator) -> Features:
    """A random half of the images."""
    chosen = np.sort(rng.permutation(len(features.pooled))[: len(features.pooled) // 2])
    return Features(features.pooled[chosen], features.logits[chosen])


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
