from itertools import pairwise

import pytest
import torch
from scipy import stats

from cxr_vae.noise import BLOCK, PURPOSES, normal


@pytest.mark.parametrize("bounds", [(0, 1, 64, 200), (0, 63, 65, 129, 200), (0, 200)])
def test_noise_depends_on_the_position_alone(bounds: tuple[int, ...]) -> None:
    whole = normal(7, "train", 0, 200, (5,))
    cut = torch.cat([normal(7, "train", a, b, (5,)) for a, b in pairwise(bounds)])
    assert torch.equal(cut, whole)


def test_no_two_positions_seeds_or_purposes_share_noise() -> None:
    rows = [normal(seed, purpose, 0, 3 * BLOCK, (4,)) for seed in (0, 1) for purpose in PURPOSES]
    assert len(torch.unique(torch.cat(rows), dim=0)) == len(rows) * 3 * BLOCK


def test_it_is_standard_normal() -> None:
    noise = normal(0, "train", 0, 20_000, (3,)).flatten().double()
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.001
    # Neighbours, also across block borders, are uncorrelated: |r| has a standard deviation of 1/√n.
    assert abs(torch.corrcoef(torch.stack([noise[:-3], noise[3:]]))[0, 1]) < 4 / 60_000**0.5


def test_shapes_and_empty_slices() -> None:
    assert normal(0, "train", 5, 8, (4, 7, 7)).shape == (3, 4, 7, 7)
    assert normal(0, "train", 5, 5, (4,)).shape == (0, 4)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    normal(0, "train", 0, 100, (4,))
    assert torch.equal(torch.rand(3), expected)
