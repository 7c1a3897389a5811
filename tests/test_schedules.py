import math
from itertools import pairwise

import pytest

from cxr_vae.config import ObjectiveConfig, OptimizerConfig
from cxr_vae.training.schedules import ema_share, kl_weight, learning_rate


def test_constant_without_warmup() -> None:
    config = OptimizerConfig(lr=0.5)
    assert {learning_rate(step, 100, config) for step in range(100)} == {0.5}
    assert {kl_weight(step, ObjectiveConfig(kl_weight=0.3)) for step in range(5)} == {0.3}


def test_warmup_grows_linearly_to_the_full_value() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(step, 100, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    objective = ObjectiveConfig(kl_weight=2.0, kl_warmup_steps=4)
    assert [kl_weight(step, objective) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cycles_grow_in_their_first_half() -> None:
    objective = ObjectiveConfig(kl_weight=2.0, kl_cycle_steps=4)
    assert [kl_weight(step, objective) for step in range(9)] == [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 1.0]
    assert kl_weight(0, ObjectiveConfig(kl_cycle_steps=1000)) == pytest.approx(0.002)


def test_cosine_falls_from_the_full_value_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(step, 110, config) for step in range(10, 111)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in pairwise(rates))


def test_an_average_follows_closely_at_first_and_then_with_its_decay() -> None:
    shares = [ema_share(step, 0.99) for step in range(2000)]
    assert shares[:3] == pytest.approx([1, 0.9, 9 / 11])
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert set(shares[891:]) == {1 - 0.99}
    # What the first tenth of the steps still counts for at a time when a constant decay would forget hardly anything.
    rest = math.prod(1 - share for share in shares[20:200])
    assert rest < 1e-8 < 0.99**180
