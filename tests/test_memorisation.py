import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import betabinom
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from cxr_vae.audit import memorisation
from cxr_vae.audit.fingerprints import Fingerprints, small_copies
from cxr_vae.audit.memorisation import (
    CopiesTest,
    Findings,
    Limit,
    ShareTest,
    chance_of_a_closer_one,
    copies_test,
    copying_statistic,
    matched_share,
    nearness_ratios,
    verdict,
)
from cxr_vae.audit.neighbours import Neighbours, Search, feature_space, likened, likened_vectors, merge, pixel_space
from cxr_vae.audit.rows import same_person
from tests.audit_images import draw_images, shifted

LEVEL = memorisation.LEVEL_OF_A_TEST
NOBODY = -1


def brightened(images: Tensor) -> Tensor:
    return (images.float() * 1.15 + 10).clamp(0, 255).to(torch.uint8)


def paler(images: Tensor) -> Tensor:
    """Much closer to the mean, as a VAE's samples are."""
    common = images.float().mean(0)
    return ((images.float() - common) * 0.4 + common).to(torch.uint8)


def blurred(images: Tensor) -> Tensor:
    return gaussian_blur(images, [13, 13], [2.5, 2.5])


def prints(images: Tensor, dims: int = 24) -> Fingerprints:
    """With the features of a random linear map: fast, and good enough to find copies."""
    weights = torch.randn(images[0].numel(), dims, generator=torch.Generator().manual_seed(7))
    return Fingerprints(small_copies(images), images.flatten(1).float() @ weights / 100)


def nearest(space, images: Fingerprints, among: Fingerprints, groups=None, among_groups=None, keep=50) -> Neighbours:
    groups = np.full(len(images.small), NOBODY) if groups is None else groups
    among_groups = np.arange(len(among.small)) if among_groups is None else among_groups
    search = Search(space, images, groups, keep, "cpu")
    for start in range(0, len(among.small), 90):  # blocks that don't divide the whole
        block = slice(start, start + 90)
        search.look_at(Fingerprints(*(part[block] for part in among)), among_groups[block], start)
    return search.found()


class TestNeighbours:
    """Against plain loops and scipy."""

    def test_pixel_distance_is_that_of_the_best_correlation_over_shifts(self) -> None:
        a, b = draw_images(5, 1), draw_images(6, 2)
        found = nearest(pixel_space(), prints(a), prints(b), keep=6)
        for i, j in itertools.product(range(5), range(6)):
            centre = b[j, 0].numpy()[2:30, 2:30].ravel().astype(float)
            best = max(
                np.corrcoef(a[i, 0].numpy()[y : y + 28, x : x + 28].ravel().astype(float), centre)[0, 1]
                for y in range(5)
                for x in range(5)
            )
            place = list(found.ids[i]).index(j)
            assert found.distances[i, place] == pytest.approx(np.sqrt(2 - 2 * best), abs=1e-4)

    def test_feature_distance_is_the_cosine_about_the_centre(self) -> None:
        a, b = prints(draw_images(7, 1)), prints(draw_images(120, 2))
        centre = b.pooled.mean(0)
        found = nearest(feature_space(centre), a, b, keep=30)
        expected = np.sqrt(2 * cdist((a.pooled - centre).double(), (b.pooled - centre).double(), "cosine"))
        assert np.array_equal(found.ids, np.argsort(expected, 1)[:, :30])
        np.testing.assert_allclose(found.distances, np.sort(expected, 1)[:, :30], rtol=1e-4)

    def test_images_of_the_same_group_are_no_neighbours(self) -> None:
        images = prints(draw_images(100, 3))
        groups = np.arange(100) // 4
        found = nearest(pixel_space(), images, images, groups, groups, keep=96)
        assert all(len(set(ids) | set(range(i // 4 * 4, i // 4 * 4 + 4))) == 100 for i, ids in enumerate(found.ids))
        more = nearest(pixel_space(), images, images, groups, groups, keep=100)
        assert np.isinf(more.distances[:, 96:]).all()
        assert (more.ids[:, 96:] == -1).all()

    def test_parts_merge_into_the_whole(self) -> None:
        a, b = prints(draw_images(9, 4)), prints(draw_images(150, 5))
        whole = nearest(pixel_space(), a, b, keep=20)
        parts = [
            Neighbours(found.distances, found.ids + start)
            for start in (0, 50, 100)
            for found in [nearest(pixel_space(), a, Fingerprints(*(x[start : start + 50] for x in b)), keep=20)]
        ]
        merged = merge(parts, 20)
        assert np.array_equal(merged.ids, whole.ids)
        np.testing.assert_allclose(merged.distances, whole.distances, atol=1e-6)

    def test_likened_vectors_have_the_mean_and_variances_of_the_samples(self) -> None:
        rng = np.random.default_rng(6)
        scales = np.array([9.0, 5, 1, 1, 1, 1])
        reference = torch.from_numpy(rng.normal(size=(25, 6)) * scales).float()
        samples = torch.from_numpy(3 + rng.normal(size=(4000, 6)) * [6, 5, 0.5, 0.5, 0.5, 0.5]).float()
        found = likened_vectors(reference, samples)  # along two components, and the rest as one
        np.testing.assert_allclose(found.mean(0), samples.mean(0), atol=1e-4)
        around = (reference - reference.mean(0)).numpy()
        basis = np.linalg.svd(around)[2][:2].T
        for direction in basis.T:
            assert (found.numpy() @ direction).std() == pytest.approx((samples.numpy() @ direction).std(), rel=1e-3)
        outside = np.eye(6) - basis @ basis.T
        rests = [np.sqrt((((x - x.mean(0)) @ outside) ** 2).mean()) for x in (found.numpy(), samples.numpy())]
        assert rests[0] == pytest.approx(rests[1], rel=1e-3)

    def test_a_blank_image_is_near_to_nothing(self) -> None:
        blank = prints(torch.full((1, 1, 32, 32), 77, dtype=torch.uint8))
        found = nearest(pixel_space(), blank, prints(draw_images(5, 1)), keep=5)
        np.testing.assert_allclose(found.distances, np.sqrt(2), rtol=1e-6)

    def test_equal_files_make_two_patients_one(self) -> None:
        hashes = np.zeros((5, 32), np.uint8)
        hashes[:, 0] = [1, 2, 3, 2, 4]
        numbers = same_person(["a", "a", "b", "c", "d"], hashes)
        assert numbers[0] == numbers[1] == numbers[3]
        assert len(set(numbers)) == 3


@pytest.fixture(scope="module")
def training() -> tuple[Tensor, np.ndarray]:
    return draw_images(400, 10), np.arange(400) % 300


class TestCopies:
    """400 training images of 300 patients, 300 samples, of which 15 are copies."""

    def result(self, training: tuple[Tensor, np.ndarray], samples: Tensor, space_name: str) -> tuple[CopiesTest, tuple]:
        images, groups = training
        real = prints(images)
        space = pixel_space() if space_name == "pixels" else feature_space(real.pooled.mean(0))
        found = nearest(space, prints(samples), real, among_groups=groups)
        ratios = nearness_ratios(found.distances)
        reference = nearness_ratios(nearest(space, likened(real, prints(samples)), real, groups, groups).distances)
        once = space.is_learned
        return copies_test(ratios, found.ids[:, 0], reference, groups, LEVEL, each_image_once=once), (ratios, found)

    @pytest.mark.parametrize("space", ["pixels", "features"])
    def test_quiet_on_new_images(self, training: tuple[Tensor, np.ndarray], space: str) -> None:
        test, _ = self.result(training, draw_images(300, 11), space)
        assert test.p_value > LEVEL
        assert test.num_independent == int(400**2 / (100 * 4 + 200))

    @pytest.mark.parametrize("fade", [paler, blurred])
    @pytest.mark.parametrize("space", ["pixels", "features"])
    def test_quiet_on_new_images_that_lack_detail(self, training: tuple[Tensor, np.ndarray], space: str, fade) -> None:
        new = draw_images(300, 11)
        test, (_, faded) = self.result(training, fade(new), space)
        assert test.p_value > LEVEL
        if space == "pixels":
            _, (_, sharp) = self.result(training, new, space)
            assert copying_statistic(faded.distances[:, 0], sharp.distances[:, 0]) < -5  # takes them for copies

    @pytest.mark.parametrize(
        ("space", "change"),
        [
            ("pixels", lambda images: images),
            ("pixels", lambda images: shifted(images, 2, 0)),
            ("pixels", lambda images: shifted(images, -1, 2)),
            ("pixels", brightened),
            ("pixels", lambda images: brightened(shifted(images, 1, -2))),
            ("features", lambda images: images),
        ],
    )
    def test_copies_are_found_and_named(self, training: tuple[Tensor, np.ndarray], space: str, change) -> None:
        rows = np.arange(7, 400, 27)[:15]
        samples = torch.cat([draw_images(285, 11), change(training[0][rows])])
        test, (ratios, found) = self.result(training, samples, space)
        assert test.p_value <= LEVEL
        assert test.best.found >= 15
        assert set(np.argsort(ratios)[:15]) == set(range(285, 300))
        assert np.array_equal(found.ids[285:, 0], rows)

    def test_loud_where_all_samples_are_the_same_training_image(self, training: tuple[Tensor, np.ndarray]) -> None:
        test, _ = self.result(training, training[0][:1].expand(60, -1, -1, -1), "pixels")
        assert test.p_value < 1e-20

    def test_loud_for_the_training_images(self, training: tuple[Tensor, np.ndarray]) -> None:
        test, (ratios, _) = self.result(training, training[0], "pixels")
        assert test.p_value < 1e-50
        assert ratios.max() < 0.01

    def test_needed_is_the_smallest_number_that_raises_the_flag(self) -> None:
        rng = np.random.default_rng(0)
        reference = rng.random(500)
        for limit_number, each_image_once in itertools.product(range(3), (False, True)):

            def limits(ratios: np.ndarray, once: bool = each_image_once) -> list[Limit]:
                return copies_test(
                    ratios, np.arange(200), reference, np.arange(500), LEVEL, each_image_once=once
                ).limits

            needed, ratio = limits(np.ones(200))[limit_number].needed, limits(np.ones(200))[limit_number].ratio
            for num, loud in ((needed - 1, False), (needed, True)):
                tested = limits(np.where(np.arange(200) < num, ratio - 1e-9, 1.0))[limit_number]
                assert tested.found == tested.num_images == num
                assert (tested.p_value * 3 <= LEVEL) == loud

    def test_an_image_near_to_many_counts_once(self) -> None:
        """As hubs are in features to samples unlike real images; against the law of as many samples."""
        reference, ratios = np.linspace(0.001, 1, 500), np.where(np.arange(200) < 60, 1e-4, 1.0)
        nearest_images = np.arange(200) % 4
        test = copies_test(ratios, nearest_images, reference, np.arange(500), LEVEL, each_image_once=True)
        assert [(limit.found, limit.num_images) for limit in test.limits] == [(60, 4)] * 3
        assert test.limits[-1].p_value == pytest.approx(betabinom(200, 25, 476).sf(3))
        assert test.p_value > LEVEL
        each = copies_test(ratios, nearest_images, reference, np.arange(500), LEVEL, each_image_once=False)
        assert each.p_value < 1e-10


class TestShare:
    """Against plain loops and enumeration."""

    def test_chance_is_that_of_all_subsets(self) -> None:
        for r in range(8):
            hits = [min(subset) < r for subset in itertools.combinations(range(8), 3)]
            assert chance_of_a_closer_one(7, 8, 3)[r] == pytest.approx(np.mean(hits))

    def test_share_is_the_mean_over_all_matched_subsets(self) -> None:
        rng = np.random.default_rng(1)
        samples, training, held_out = rng.random((5, 2)), rng.random((8, 2)), rng.random((3, 2))
        distances = cdist(samples, np.concatenate([training, held_out]))
        is_held_out = np.arange(11) >= 8
        test = matched_share(np.argsort(distances, 1), is_held_out, np.ones(11, int), 0)
        shares = [
            (distances[:, subset].min(1) < distances[:, 8:].min(1)).mean()
            for subset in map(list, itertools.combinations(range(8), 3))
        ]
        assert test.share == pytest.approx(np.mean(shares))

    def test_false_alarms_are_as_stated_although_patients_have_many_images(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Patients' images lie together, and samples share neighbours: a binomial test would alarm far more often."""
        monkeypatch.setattr(memorisation, "NUM_PERMUTATIONS", 99)
        rng = np.random.default_rng(2)
        p_values = []
        for _ in range(300):
            patients = np.repeat(np.arange(60), 4)
            images = (rng.normal(size=(60, 3)))[patients] + 0.1 * rng.normal(size=(240, 3))
            samples = rng.normal(size=(100, 3))
            order = np.argsort(cdist(samples, images), 1)[:, :50]
            p_values.append(matched_share(patients[order], np.arange(60) < 15, np.full(60, 4), 0).p_value)
        for level in (0.02, 0.1, 0.3):
            assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=3.5 * np.sqrt(level / 300))

    def test_samples_near_training_images_are_noticed(self) -> None:
        rng = np.random.default_rng(3)
        images, patients = rng.normal(size=(200, 5)), np.arange(200)
        samples = images[rng.integers(0, 150, 100)] + 0.4 * rng.normal(size=(100, 5))
        order = np.argsort(cdist(samples, images), 1)[:, :50]
        test = matched_share(order, patients >= 150, np.ones(200, int), 0)
        assert test.share > 0.6
        assert test.p_value <= LEVEL


def test_copies_test_alarms_as_often_as_stated() -> None:
    """Over draws from one distribution, whatever it is; with several images a patient it must err on the quiet side."""
    rng = np.random.default_rng(4)
    alone, related = [], []
    for _ in range(600):
        patients = np.repeat(np.arange(100), 3)
        samples = rng.random(200), np.arange(200)
        alone.append(copies_test(*samples, rng.random(300), np.arange(300), LEVEL, each_image_once=False))
        related.append(copies_test(*samples, rng.random(100)[patients], patients, LEVEL, each_image_once=False))
    for tests in (alone, related):
        p_values = np.array([test.p_value for test in tests])
        for level in (LEVEL, 0.05, 0.2):
            assert np.mean(p_values <= level) <= level + 3 * np.sqrt(level / 600)
        of_one = np.array([test.limits[-1].p_value for test in tests])
        assert np.mean(of_one <= 0.2) == pytest.approx(0.2, abs=0.06)  # it isn't quiet for want of power


def test_share_raises_the_flag_only_above_that_of_training_images() -> None:
    """Held-out images of a distribution that differs a little are farther from everything, seen or not."""
    quiet = copies_test(np.ones(50), np.arange(50), np.linspace(0, 1, 50), np.arange(50), LEVEL, each_image_once=False)
    of_training = ShareTest(share=0.57, p_value=0.03, two_sided=0.06)
    for p_above_training, loud in ((0.3, False), (1e-4, True)):
        found = Findings("pixels", 50, quiet, ShareTest(0.6, 5e-4, 1e-3), of_training, p_above_training, 0.0, 0.0)
        assert not found.held_out_differs
        assert found.p_share == max(5e-4, p_above_training)
        flag, reason = verdict([found, found])
        assert flag == loud == ("closer to training" in reason and "60.0%" in reason)


def test_statistic_of_meehan() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(40), rng.random(30) + 0.2
    wins = (a[:, None] > b).sum()
    assert copying_statistic(a, b) == pytest.approx((wins - 600) / np.sqrt(40 * 30 * 71 / 12))
    assert copying_statistic(a, b) < -2
