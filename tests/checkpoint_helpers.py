"""States of a training, saved and compared."""

from pathlib import Path
from typing import Any

import torch

from cxr_vae.checkpoints.manifest import name_of, published
from cxr_vae.checkpoints.saving import Checkpoints
from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config_file import load_config
from cxr_vae.distributed import World
from cxr_vae.training.schedules import ema_share
from tests.helpers import TINY

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def checkpoints(folder: Path, *options: str, train_hash: str = "abc", **how: Any) -> Checkpoints:
    config = load_config(None, [*TINY, "every_minutes=1", *options])
    return Checkpoints(folder, ALONE, config, {"train": train_hash}, **how)


def save(folder: Path, state: TrainState, *options: str, test_loss: float | None = None) -> Path:
    """Saves and waits; returns the checkpoint."""
    saving = checkpoints(folder, *options)
    saving.save(state, test_loss)
    saving.wait()
    return folder / name_of(state.step)


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in published(folder)]


def new_state(*options: str) -> TrainState:
    return TrainState.create(load_config(None, [*TINY, *options]), ALONE.device)


def advance(state: TrainState, steps: int = 1) -> TrainState:
    """Steps with gradients that depend on the step, so that every tensor of the state moves."""
    for _ in range(steps):
        torch.manual_seed(state.step)
        output = state.model(torch.rand(4, 1, 32, 32), torch.randn(4, 4))
        (output.logits.square().mean() + output.mean.square().mean() + output.logvar.square().mean()).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.add(torch.tensor([1.5, 0.25], dtype=torch.float64), 4, torch.tensor(True), ema_share(state.step, 0.9))
        state.count(4)
    return state


def skip(state: TrainState) -> None:
    """A step that changes nothing."""
    state.add(torch.full((2,), torch.nan, dtype=torch.float64), 4, torch.tensor(False), ema_share(state.step, 0.9))
    state.count(4)
    state.num_skipped += 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert_equal_tensors(a.state_dict(), b.state_dict())


def assert_equal_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
