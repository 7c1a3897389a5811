import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cxr_vae.config import EvaluateConfig
from cxr_vae.errors import UserError
from cxr_vae.evaluation.features import Features
from cxr_vae.evaluation.metrics import (
    Pairs,
    called,
    check_counts,
    compare,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    with_interval,
)


def unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    return Pairs(a, b).mmd(np.arange(len(a)), np.arange(len(b)))


def sets(num_a: int, num_b: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of correlated features with different means and spreads."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    return rng.normal(size=(num_a, dim)) @ mix + 0.3, 1.4 * rng.normal(size=(num_b, dim)) @ mix


@pytest.mark.parametrize(("num_a", "num_b", "dim"), [(300, 200, 32), (40, 60, 64), (30, 200, 64), (2, 3, 16)])
def test_frechet_distance_is_its_definition(num_a: int, num_b: int, dim: int) -> None:
    a, b = sets(num_a, num_b, dim)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1])
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    tolerance = 1e-9 if min(num_a, num_b) > dim else 1e-4  # sqrtm itself is poor where a covariance is singular
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("num_a", "num_b"), [(64, 64), (200, 500)])
def test_frechet_distance_is_torch_fidelitys(num_a: int, num_b: int) -> None:
    a, b = sets(num_a, num_b, 256)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_identical_sets_are_at_distance_zero_and_shifted_ones_at_the_shift() -> None:
    a, _ = sets(100, 2, 40)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[::-1] + 2.0) == pytest.approx(40 * 4.0)


def test_kernel_distance_takes_every_image_where_there_are_few() -> None:
    a, b = sets(50, 50, 16)
    features = [Features(torch.from_numpy(x).float(), torch.zeros(50, 3)) for x in (a, b)]
    k = [[(x @ y.T / 16 + 1) ** 3 for y in (a, b)] for x in (a, b)]  # Bińkowski et al. 2018
    unbiased = sum((k[i][i].sum() - np.trace(k[i][i])) / (50 * 49) for i in (0, 1)) - 2 * k[0][1].mean()
    assert kernel_distance(*features, 1000, Pairs(a, b)) == pytest.approx(unbiased, rel=1e-4)
    assert unbiased_mmd(a, b) == pytest.approx(unbiased, rel=1e-9)


def test_kernel_distance_of_subsets_converges_to_that_of_all() -> None:
    a, b = sets(90, 60, 16)
    features = [Features(torch.from_numpy(x).float(), torch.zeros(len(x), 3)) for x in (a, b)]
    assert kernel_distance(*features, 55, Pairs(a, b)) == pytest.approx(unbiased_mmd(a, b), rel=0.05)


def test_kernel_distance_is_torch_fidelitys_whether_pairs_are_known_or_not() -> None:
    features = [Features(torch.from_numpy(x).float(), None) for x in sets(90, 60, 16)]
    doubles = [x.pooled.double() for x in features]
    expected = kid_features_to_metric(*doubles, kid_subset_size=50, verbose=False)["kernel_inception_distance_mean"]
    known = Pairs(*(x.numpy() for x in doubles))
    assert kernel_distance(*features, 50, known) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(*features, 50, Pairs(known.a[:20], known.b)) == expected


def test_figures_are_the_same_bits_on_any_number_of_cores() -> None:
    features = [Features(torch.from_numpy(x).float(), torch.from_numpy(x)) for x in sets(60, 50, 96)]
    before, found = torch.get_num_threads(), []
    for cores in (1, 2, 5):
        torch.set_num_threads(cores)
        try:
            found.append(compare(*features, EvaluateConfig()))
            assert torch.get_num_threads() == cores
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_interval_has_the_width_of_the_standard_error() -> None:
    """Of a mean the standard error is known: σ/√n."""
    torch.manual_seed(0)
    features = Features(torch.randn(400, 1), torch.zeros(400, 1))
    figure = with_interval(lambda i, _: float(features.pooled[i].mean()), 400, 400, num_halves=2000)
    low, high = figure.interval_95
    assert figure.value == pytest.approx(float(features.pooled.mean()))
    assert (high - low) / 2 == pytest.approx(1.96 * float(features.pooled.std()) / 20, rel=0.1)


def test_intervals_cover_the_figure_of_a_fresh_sample() -> None:
    """The figure at this N, measured anew on fresh samples, falls into the interval about as often as promised."""
    config = EvaluateConfig(is_splits=1)

    def mixed(seed: int) -> tuple[Features, Features]:
        rng = np.random.default_rng(seed)
        mix = np.random.default_rng(99).normal(size=(24, 24)) / 24**0.5
        a, b = rng.normal(size=(120, 24)) @ mix + 0.3, 1.4 * rng.normal(size=(120, 24)) @ mix
        return Features(torch.from_numpy(a), torch.from_numpy(a)), Features(torch.from_numpy(b), torch.from_numpy(b))

    figures = [compare(*mixed(seed), config) for seed in range(30)]
    for name in ("frechet", "frechet_infinity", "kernel", "density", "coverage"):
        typical = np.mean([figure[name].value for figure in figures])
        covered = np.mean([low <= typical <= high for low, high in (figure[name].interval_95 for figure in figures)])
        assert covered >= 0.8, (name, covered)


@pytest.mark.parametrize(("num_a", "num_b"), [(64, 90), (30, 12)])
def test_precision_and_recall_are_torch_fidelitys(num_a: int, num_b: int) -> None:
    a, b = sets(num_a, num_b, 8)
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **options)
    every = np.arange(num_a), np.arange(num_b)
    assert 0 < min(expected["precision"], expected["recall"]) < 1
    assert Pairs(a, b).precision(*every) == pytest.approx(expected["precision"], abs=1e-6)
    assert Pairs(a, b).recall(*every) == pytest.approx(expected["recall"], abs=1e-6)


def test_density_and_coverage_are_their_definitions() -> None:
    """Counted one by one; Naeem et al. 2020, eq. 4 and 5, k = 5."""
    a, b = sets(40, 30, 6)
    radii = [sorted(np.linalg.norm(x - y) for y in b)[5] for x in b]
    inside = np.array([[np.linalg.norm(x - y) < radius for y, radius in zip(b, radii, strict=True)] for x in a])
    every = np.arange(40), np.arange(30)
    assert Pairs(a, b).density(*every) == pytest.approx(inside.sum() / (5 * 40))
    assert Pairs(a, b).coverage(*every) == pytest.approx(inside.any(0).mean())
    some, others = np.arange(3, 25), np.arange(10, 30)
    assert Pairs(a, b).density(some, others) == Pairs(a[some], b[others]).density(np.arange(22), np.arange(20))


def test_extrapolation_takes_most_of_the_bias_away() -> None:
    """Two normal sets whose distance is known: a shift of 0.5 in one of 32 directions."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(200, 32)), rng.normal(size=(200, 32))
        a[:, 0] += 0.5
        found.append((frechet_distance(a, b) - 0.25, frechet_infinity(a, b) - 0.25))
    biases = np.abs(np.mean(found, axis=0))
    assert biases[0] > 1  # of 0.25
    assert biases[1] < 0.15 * biases[0]


def test_only_inceptions_figures_have_the_known_names() -> None:
    assert called("frechet", "inception") == "fid"
    assert called("precision", "inception") == "precision"
    assert called("frechet", "random") == "frechet_random"
    assert called("kernel", "my.module:densenet") == "kernel_densenet"


@pytest.mark.parametrize("num", [40, 96, 400])
def test_interval_of_the_score_is_as_wide_as_fresh_samples_spread(num: int) -> None:
    def images(seed: int) -> Features:
        logits = 2 * torch.randn(num, 50, generator=torch.Generator().manual_seed(seed))
        return Features(logits, logits)

    figures = [inception_score(images(seed), EvaluateConfig()) for seed in range(60)]
    spread = np.std([figure.value for figure in figures], ddof=1)
    widths = [(high - low) / 2 / 1.96 for low, high in (figure.interval_95 for figure in figures)]
    assert np.mean(widths) == pytest.approx(spread, rel=0.35)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"is_splits=10 needs at least 20 generated images.*num_generated is 19"):
        check_counts(100, 100, EvaluateConfig(num_generated=19))
    with pytest.raises(UserError, match="3 images of the test split are too few"):
        check_counts(3, 100, EvaluateConfig())
    with pytest.raises(UserError, match="2 images of the train split are too few"):
        check_counts(100, 2, EvaluateConfig())
    check_counts(4, 4, EvaluateConfig(num_generated=20))
