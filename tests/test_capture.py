"""Steps replayed as CUDA graphs against steps told kernel by kernel: the same bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config_file import load_config
from cxr_vae.distributed import World
from cxr_vae.noise import normal
from cxr_vae.training.schedules import kl_weight, learning_rate
from cxr_vae.training.vae_step import VaeStep

pytestmark = pytest.mark.gpu

NUM_STEPS = 10
BATCH = 8

COMMON = (
    *("image_size=64", f"batch_size={BATCH}", "ema_decay=0.9", "skip_nonfinite=2"),
    *("kl_warmup_steps=7", "optimizer.warmup_steps=4", "schedule=cosine"),
)
KINDS: dict[str, tuple[str, ...]] = {
    "conv": (),
    "conv in parts": ("accumulate=2", "precision=fp32"),
    "residual, adversarial from the middle on": (
        *("model.name=residual", "model.norm=group", "model.channels=[16, 32, 64]", "num_classes=2"),
        *("likelihood=gaussian", "adversarial_weight=0.5", "adversarial_start_step=5", "adversarial_channels=8"),
        "feature_matching_weight=10",
    ),
}
"""The middle falls after the graph of the first kind of step was captured, and leaves steps enough for the second."""


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `world` sets it for a run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.cuda.synchronize()


def new_step(*options: str) -> VaeStep:
    config = load_config(None, [*COMMON, *options])
    here = World(0, 1, 0, 1, torch.device("cuda", 0))
    state = TrainState.create(config, here.device)
    return VaeStep(config, state, state.model, here)


def run(step: VaeStep, stop: int, poisoned: int | None = None) -> list[list[Tensor]]:
    """Steps up to `stop`, with another batch, KL weight and learning rate each; the outcomes of all of them.

    The noise of step number `poisoned` has a nan.
    """
    config, device, outcomes = step.config, step.here.device, []
    while (number := step.state.step) < stop:
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (BATCH, 1, 64, 64), dtype=torch.uint8, generator=generator)
        noise = normal(0, "train", number * BATCH, (number + 1) * BATCH, step.state.model.latent_shape, device)
        if number == poisoned:
            noise[3] = torch.nan
        labels = torch.arange(BATCH if config.model.num_classes else 0, device=device) % 2
        rate = learning_rate(number, 2 * NUM_STEPS, config.optimizer)
        outcome = step((images.to(device), noise, labels), kl_weight(number, config.objective), rate)
        outcomes.append([tensor.cpu() for tensor in outcome])
    return outcomes


def state_of(step: VaeStep) -> dict[str, Tensor]:
    """Weights, moments, average, sums and counters."""
    return {name: tensor.clone() for name, tensor in step.state.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected) or (found.isnan().any() and torch.equal(found.isnan(), expected.isnan()))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
        assert different == []
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


def graphs(step: VaeStep) -> list[bool]:
    """Whether each kind of step was captured."""
    return [getattr(update, "_graph", None) is not None for update in step._updates.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(kind: str) -> None:
    replayed, eager = new_step(*KINDS[kind]), new_step(*KINDS[kind], "cuda_graph=false")
    assert_same(state_of(replayed), state_of(eager))
    assert_same(run(replayed, NUM_STEPS), run(eager, NUM_STEPS))
    assert_same(state_of(replayed), state_of(eager))
    assert graphs(replayed) == [True] * (2 if "adversarial" in kind else 1)
    assert not any(graphs(eager))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [2, 6], ids=["before", "after the capture"])
def test_resumed_they_are_those_of_one_stretch(kind: str, at: int) -> None:
    whole, first, second = (new_step(*KINDS[kind]) for _ in range(3))
    expected = run(whole, NUM_STEPS)
    found = run(first, at)
    second.state.load_state_dict({name: tensor.cpu() for name, tensor in state_of(first).items()})
    assert_same(found + run(second, NUM_STEPS), expected)
    assert_same(state_of(second), state_of(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_with_a_nan_changes_nothing(kind: str) -> None:
    replayed, eager = new_step(*KINDS[kind]), new_step(*KINDS[kind], "cuda_graph=false")
    assert_same(run(replayed, NUM_STEPS, poisoned=8), run(eager, NUM_STEPS, poisoned=8))
    assert_same(state_of(replayed), state_of(eager))
    last = new_step(*KINDS[kind])
    run(last, NUM_STEPS - 1)
    before = state_of(last)
    (outcome,) = run(last, NUM_STEPS, poisoned=NUM_STEPS - 1)
    assert not outcome[3]
    assert outcome[2].tolist() == [number != 3 for number in range(BATCH)] or "conv" in kind  # batch norm mixes them
    after = state_of(last)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"counters"}


def test_outcomes_are_not_overwritten_by_the_next_step() -> None:
    step = new_step()
    run(step, 5)
    generator = torch.Generator(step.here.device).manual_seed(0)
    images = torch.zeros(BATCH, 1, 64, 64, dtype=torch.uint8, device=step.here.device)
    noise = torch.randn(BATCH, *step.state.model.latent_shape, generator=generator, device=step.here.device)
    labels = torch.empty(0, dtype=torch.int64, device=step.here.device)
    outcome = step((images, noise, labels), 1.0, 1e-3)
    sums = outcome.sums.cpu()
    step((255 - images, noise, labels), 1.0, 1e-3)
    assert torch.equal(outcome.sums.cpu(), sums)
