"""A training step's numbers, and what it does that can be counted without a clock."""

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cxr_vae.checkpoints.state import TrainState, follow
from cxr_vae.config_file import load_config
from cxr_vae.distributed import World
from cxr_vae.losses.elbo import negative_elbo
from cxr_vae.models import build_model
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import StopSignal
from cxr_vae.training.guard import UnseenOutcomes
from cxr_vae.training.train import Training
from cxr_vae.training.vae_step import VaeStep
from tests.helpers import TINY

ALONE = World(0, 1, 0, 1, torch.device("cpu"))

LOOKS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero"}
"""What a GPU would have to be waited for, done to a tensor."""

NO_LABELS = torch.empty(0, dtype=torch.int64)

COPIES = {"aten._to_copy", "aten.copy_", "aten.clone"}


class CountOps(TorchDispatchMode):
    """Operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func).rsplit(".", 1)[0]] += 1
        return func(*args, **(kwargs or {}))


class CountLooks(TorchFunctionMode):
    """Calls that look at the numbers of floating-point or boolean tensors, the only ones that live on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LOOKS and isinstance(args[0], torch.Tensor) and args[0].dtype not in (torch.int32, torch.int64):
            self.looks[name] += 1
        return func(*args, **(kwargs or {}))


def new_step(*options: str) -> tuple[VaeStep, torch.Tensor, torch.Tensor]:
    """A step of the reference model, with a batch for it."""
    config = load_config(None, ["image_size=64", "batch_size=4", *options])
    state = TrainState.create(config, ALONE.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8, generator=generator)
    return VaeStep(config, state, state.model, ALONE), images, torch.randn(4, 128, generator=generator)


def test_steps_are_those_of_a_plain_program() -> None:
    step, images, noise = new_step("precision=fp32")
    plain = build_model(step.config)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, foreach=False, fused=False)
    for _ in range(3):
        optimizer.zero_grad()
        output = plain(images.float() / 255, noise)
        losses = negative_elbo(output, images.float() / 255, "bernoulli")
        losses.total().mean().backward()
        norm = torch.cat([parameter.grad.double().flatten() for parameter in plain.parameters()]).norm().float()
        optimizer.step()
        outcome = step((images, noise, NO_LABELS), 1.0, 1e-3)
        assert outcome.applied
        assert outcome.finite.all()
        tight = {"rtol": 1e-6 if step.state.step == 1 else 2e-4, "atol": 1e-6}  # Adam makes rounding large
        torch.testing.assert_close(
            outcome.sums, torch.stack([term.detach().double().sum() for term in losses]), **tight
        )
        torch.testing.assert_close(outcome.gradient_norm, norm, rtol=3e-4, atol=0)
    assert (step.state.step, step.state.samples_seen) == (3, 12)


@pytest.mark.parametrize("options", [(), ("skip_nonfinite=3", "ema_decay=0.9", "accumulate=2")])
def test_a_step_looks_at_nothing(options: tuple[str, ...]) -> None:
    step, images, noise = new_step(*options)
    step((images, noise, NO_LABELS), 1.0, 1e-3)
    counting = CountLooks()
    with counting, CountOps() as counted:
        step((images, noise, NO_LABELS), 1.0, 1e-3)
    assert counting.looks == {}
    assert not {name for name in counted.ops if "local_scalar" in name or "nonzero" in name or "equal" in name}


def test_operators_of_a_step_are_few_and_none_copies() -> None:
    step, images, noise = new_step("precision=fp32")
    step((images, noise, NO_LABELS), 1.0, 1e-3)
    with CountOps() as counted:
        step((images, noise, NO_LABELS), 1.0, 1e-3)
    assert {name: counted.ops[name] for name in ("aten.convolution", "aten.convolution_backward")} == {
        "aten.convolution": 10,
        "aten.convolution_backward": 10,
    }
    assert counted.ops["aten._fused_adam_"] == 1
    copied = {name: number for name, number in counted.ops.items() if name in COPIES}
    assert sum(copied.values()) <= 3, copied  # of numbers, not of images or weights
    assert sum(counted.ops.values()) <= 290


def test_a_run_looks_at_numbers_only_where_they_are_logged(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where outcomes are looked at when there is a reason to and not at every step."""
    monkeypatch.setattr(UnseenOutcomes, "is_due", lambda self: False)

    def looks(epochs: int, log_every: int) -> int:
        options = [*TINY, f"data.shards={shards}", f"run_dir={tmp_path / f'{epochs}-{log_every}'}", f"epochs={epochs}"]
        config = load_config(None, [*options, f"log_every={log_every}", "grid_every=99", "checkpoint.best=false"])
        training = Training(config, RunDir(Path(config.run_dir)), ALONE)
        counting = CountLooks()
        with counting:
            assert training.loop(StopSignal())
        training.close()
        return sum(counting.looks.values())

    two, four, six = (looks(epochs, 1000) for epochs in (2, 4, 6))
    assert six - four == four - two <= 2 * 14  # the same for each epoch, and few: losses and records
    assert looks(2, 2) - two <= 5 * 9  # five more steps are logged


def test_outcomes_are_looked_at_in_time() -> None:
    step, images, noise = new_step("skip_nonfinite=9", "norm=group")
    watch = UnseenOutcomes(step.state.scaler)
    assert not watch.is_due()
    for number, poison in enumerate([1.0, torch.nan, 1.0], start=1):
        watch.add(number, step((images, noise * torch.tensor([1, poison, 1, 1])[:, None], NO_LABELS), 1.0, 1e-3))
    assert watch.is_due()
    ((bad, finite),) = watch.left_out()
    assert (bad, finite.tolist()) == (2, [True, False, True, True])
    assert list(watch.left_out()) == []
    assert step.state.epoch_sums[2] == 8  # images of the two steps that were done
    assert step.state.optimizer.state[step.state.model.to_mean.weight]["step"] == 2


def test_the_average_of_weights() -> None:
    config = load_config(None, ["image_size=32", "model.channels=[8, 16]", "latent_dim=4"])
    model = build_model(config)
    ema, expected = deepcopy(model), {}
    for share in (1.0, 0.25, torch.tensor(0.25), 0.5):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(3)
        follow(ema, model, share)
        for name, tensor in model.state_dict().items():
            old = expected.get(name, tensor.double())
            expected[name] = (1 - share) * old + share * tensor.double()
    kept = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor == model.state_dict()[name]  # a count
    follow(ema, model, torch.tensor(0.0))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ema.state_dict().items())
