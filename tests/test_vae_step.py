"""The adversarial step: its gradients against a plain program's, and what it must leave alone."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config_file import load_config
from cxr_vae.losses.adversarial import SMALLEST_NORM
from cxr_vae.training.run_log import read_records
from cxr_vae.training.vae_step import VaeStep
from tests.ranks import on_ranks
from tests.test_step import ALONE, CountLooks, CountOps

TINY_STEP = (
    *("image_size=32", "model.channels=[8, 16]", "latent_dim=4", "norm=group", "batch_size=5"),
    *("precision=fp32", "adversarial_channels=4"),
)
ADVERSARIAL = ("adversarial_weight=0.7", "lr=0.001")
KL_WEIGHT = 0.3

Batch = tuple[Tensor, Tensor, Tensor]


def new_step(*options: str) -> tuple[VaeStep, Batch]:
    """A step and a batch; a discriminator that is sure of itself, so that the hinges of some patches are at rest."""
    config = load_config(None, [*TINY_STEP, *options])
    state = TrainState.create(config, ALONE.device)
    if state.critic is not None:
        with torch.no_grad():
            state.critic.model.layers[-1].weight.mul_(30)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=generator)
    noise = torch.randn(5, *state.model.latent_shape, generator=generator)
    return VaeStep(config, state, state.model, ALONE), (images, noise, torch.tensor([0, 1, 1, 0, 1]))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def plain_gradients(step: VaeStep, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The VAE's and the discriminator's in float64, image by image, from the equations, with nothing of ours."""
    options, likelihood = step.config.objective, step.config.objective.likelihood
    vae, critic = deepcopy(step.state.model).double(), deepcopy(step.state.critic.model).double()
    images, noise = batch[0].double() / 255, batch[1].double()
    of_vae, of_critic = dict(vae.named_parameters()), dict(critic.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in (*of_vae.items(), *of_critic.items())}
    for image, epsilon, label in zip(images.split(1), noise.split(1), batch[2].split(1), strict=True):
        mean, logvar = vae.encode(image)
        logits = vae.decode(mean + (logvar / 2).exp() * epsilon, label if vae.num_classes else None)
        fake = torch.sigmoid(logits)
        if likelihood == "bernoulli":
            nll = -(image * fake.log() + (1 - image) * (1 - fake).log()).sum()
        else:
            nll = -torch.distributions.Normal(fake, vae.log_scale.exp()).log_prob(image).sum()
        kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
        *features, verdict = critic(fake)
        matching = [(a - b).abs().mean() for a, b in zip(critic(image)[:-1], features, strict=True)]
        deceiving = -verdict.mean() + options.feature_matching_weight * sum(matching)
        pull, push = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (nll, deceiving))
        weight = float(pull.norm() / (push.norm() + SMALLEST_NORM))
        loss = nll + KL_WEIGHT * kl + options.adversarial_weight * weight * deceiving
        hinges = F.relu(1 - critic(image)[-1]).mean() / 2 + F.relu(1 + critic(fake.detach())[-1]).mean() / 2
        for parameters, of in ((of_vae, loss), (of_critic, hinges)):
            parts = torch.autograd.grad(of, list(parameters.values()), retain_graph=True)
            for name, part in zip(parameters, parts, strict=True):
                sums[name] += part / len(images)
    return {name: sums[name] for name in of_vae}, {name: sums[name] for name in of_critic}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Tensors by name, relative to their norms; what is rounding alone is small beside the largest."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).norm())
        assert error <= tolerance * max(float(tensor.norm()), 1e-3 * largest), (name, error, float(tensor.norm()))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("feature_matching_weight=10",),
        ("likelihood=gaussian", "num_classes=2"),
        ("likelihood=gaussian", "num_classes=2", "model.name=residual", "latent_dim=null", "latent_channels=2"),
    ],
    ids=["bernoulli", "feature matching", "gaussian told the class", "residual"],
)
def test_gradients_are_those_of_the_equations(options: tuple[str, ...]) -> None:
    step, batch = new_step(*ADVERSARIAL, *options)
    of_vae, of_critic = plain_gradients(step, batch)
    _, finite = step.backward(batch, KL_WEIGHT)
    assert finite.all()
    assert_near(gradients(step.state.model), of_vae, 2e-4)
    assert_near(gradients(step.state.critic.model), of_critic, 2e-4)
    assert all(parameter.requires_grad for parameter in step.state.critic.model.parameters())


def test_the_loss_that_is_reported_is_the_elbo_and_the_hinge() -> None:
    """And not what the step minimises, whose value means nothing."""
    step, batch = new_step(*ADVERSARIAL)
    without, _ = new_step()
    sums, _ = step.backward(batch, KL_WEIGHT)
    torch.testing.assert_close(sums[:2], without.backward(batch, KL_WEIGHT)[0], rtol=1e-6, atol=0)
    images = batch[0].float() / 255
    critic = step.state.critic.model
    with torch.no_grad():
        fake = torch.sigmoid(step.state.model(images, batch[1]).logits)
        hinges = F.relu(1 - critic(images)[-1]).mean((1, 2, 3)) / 2 + F.relu(1 + critic(fake)[-1]).mean((1, 2, 3)) / 2
    assert float(sums[2]) == pytest.approx(float(hinges.sum()), rel=1e-5)


def test_until_it_starts_the_run_is_one_without() -> None:
    step, batch = new_step(*ADVERSARIAL, "adversarial_start_step=3")
    without, _ = new_step()
    before = {name: tensor.clone() for name, tensor in step.state.state_dict().items() if "critic" in name}
    for _ in range(3):
        assert not step.is_adversarial
        assert step(batch, KL_WEIGHT, 1e-3).applied
        without(batch, KL_WEIGHT, 1e-3)
    now = step.state.state_dict()
    for name, tensor in without.state.state_dict().items():
        assert torch.equal(now[name], tensor), name
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert step.is_adversarial
    step(batch, KL_WEIGHT, 1e-3)
    without(batch, KL_WEIGHT, 1e-3)
    now = step.state.state_dict()
    for name, tensor in before.items():
        assert not torch.equal(now[name], tensor), name
    theirs = without.state.model.state_dict()
    assert not all(torch.equal(theirs[name], tensor) for name, tensor in step.state.model.state_dict().items())


def test_micro_batches_make_no_difference() -> None:
    one, batch = new_step(*ADVERSARIAL)
    three, _ = new_step(*ADVERSARIAL, "accumulate=3")
    torch.testing.assert_close(three.backward(batch, 1.0)[0], one.backward(batch, 1.0)[0], rtol=1e-6, atol=0)
    for kind in ("model", "critic"):
        found, expected = (
            gradients(step.state.model if kind == "model" else step.state.critic.model) for step in (three, one)
        )
        assert_near(found, expected, 1e-4)


@pytest.fixture(scope="module")
def one_process(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of the first step, and the losses of a run, of one process."""
    folder = tmp_path_factory.mktemp("one")
    found = on_ranks("gradients", 1, folder, shards, folder / "run", *OF_RANKS, MATCHING)[0]
    return found, losses_of(folder, 1, shards, *OF_RANKS)


OF_RANKS = ("adversarial_weight=0.7", "adversarial_channels=4", "num_classes=2", "likelihood=gaussian", "norm=group")
MATCHING = "feature_matching_weight=10"
"""For one step alone: its gradient jumps where two features are the same, and rounding decides to which side."""


def losses_of(folder: Path, ranks: int, shards: Path, *options: str) -> list[float]:
    """All losses of a run's steps."""
    run = folder / "whole"
    states = on_ranks("states", ranks, folder / "states", shards, run, "epochs=2", "precision=fp32", *options)
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    records = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "step"]
    return [record[name] for record in records for name in ("reconstruction_nats", "kl_nats", "discriminator_loss")]


def test_two_processes_are_as_one(
    one_process: tuple[dict[str, Tensor], list[float]], shards: Path, tmp_path: Path
) -> None:
    expected, losses = one_process
    for found in on_ranks("gradients", 2, tmp_path, shards, tmp_path / "run", "accumulate=2", *OF_RANKS, MATCHING):
        torch.testing.assert_close(found.pop("sums"), expected["sums"], rtol=1e-6, atol=1e-6)
        assert any(name.startswith("critic.") for name in found)
        assert_near(found, {name: tensor for name, tensor in expected.items() if name != "sums"}, 1e-4)
    assert len(losses) == 30
    assert losses_of(tmp_path, 2, shards, *OF_RANKS) == pytest.approx(losses, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("what", ["image", "discriminator"])
def test_a_loss_that_is_no_number_changes_neither_network(what: str) -> None:
    step, (images, noise, labels) = new_step(*ADVERSARIAL, "ema_decay=0.9", "skip_nonfinite=1")
    step((images, noise, labels), KL_WEIGHT, 1e-3)
    if what == "image":
        noise = noise * torch.tensor([1, 1, torch.nan, 1, 1])[:, None]
    else:
        step.state.critic.model.layers[0].bias.data[1] = torch.inf
    before = {name: tensor.clone() for name, tensor in step.state.state_dict().items()}
    outcome = step((images, noise, labels), KL_WEIGHT, 1e-3)
    assert not outcome.applied
    assert outcome.finite.tolist() == ([True, True, False, True, True] if what == "image" else [False] * 5)
    after = step.state.state_dict()
    for name, tensor in before.items():
        if name != "counters":
            assert torch.equal(after[name], tensor), name
    assert step.state.step == 2


@pytest.mark.parametrize("options", [(), ("skip_nonfinite=3", "ema_decay=0.9", "accumulate=2", "precision=bf16")])
def test_an_adversarial_step_looks_at_nothing(options: tuple[str, ...]) -> None:
    step, batch = new_step(*ADVERSARIAL, *options)
    step(batch, KL_WEIGHT, 1e-3)
    counting = CountLooks()
    with counting, CountOps() as counted:
        outcome = step(batch, KL_WEIGHT, 1e-3)
    assert counting.looks == {}
    assert not {name for name in counted.ops if "local_scalar" in name or "nonzero" in name or "equal" in name}
    assert outcome.applied


def test_in_bf16_the_losses_are_nearly_those_of_fp32() -> None:
    (step, batch), (exact, _) = new_step(*ADVERSARIAL, "precision=bf16"), new_step(*ADVERSARIAL)
    for of in (step, exact):
        of.backward(batch, KL_WEIGHT)
    for name in ("model", "critic"):
        found, expected = (
            torch.cat([gradient.flatten() for gradient in gradients(module).values()])
            for module in ((of.state.model if name == "model" else of.state.critic.model) for of in (step, exact))
        )
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found, expected, dim=0) > 0.99
