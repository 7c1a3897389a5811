import math

import pytest
import torch
from torch import Tensor

from cxr_vae.config import PriorConfig
from cxr_vae.errors import UserError
from cxr_vae.noise import normal, uniform
from cxr_vae.priors import build_prior
from cxr_vae.priors.flow_matching import FlowMatchingPrior
from cxr_vae.priors.unet import UNet
from tests.test_priors import SPATIAL, built, fit


class TestFlowMatching:
    """flow_matching."""

    def test_loss_is_the_formula(self) -> None:
        prior = built("flow_matching", times="uniform", label_dropout=0.25)
        assert isinstance(prior, FlowMatchingPrior)
        latents, noise = (normal(0, purpose, 0, 3, SPATIAL) for purpose in ("grid", "generate"))
        shares, labels = torch.tensor([0.125, 0.25 + 0.75 * 0.4, 0.9]), torch.tensor([1, 0, 1])
        times, classes = torch.tensor([0.5, 0.4, 0.65 / 0.75]), torch.tensor([2, 0, 1])  # the first's isn't told
        target = (latents - prior.centre) / prior.scale
        at = times[:, None, None, None]
        velocity = prior.network(at * target + (1 - at) * noise, times, classes)
        expected = ((velocity - target + noise) ** 2).mean((1, 2, 3))
        torch.testing.assert_close(prior.loss(latents, noise, shares, labels), expected)
        moved = prior.loss(latents, noise, shares, torch.tensor([0, 0, 1]))
        assert torch.equal(moved[0], expected[0]) or torch.allclose(moved, expected)

    def test_times_are_logit_normal_whether_the_class_is_told_or_not(self) -> None:
        prior = built("flow_matching")
        seen: dict[str, Tensor] = {}

        def watch(module: torch.nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            seen["times"], seen["classes"] = arguments[1], arguments[2]

        prior.network.register_forward_pre_hook(watch)  # type: ignore[union-attr]
        num = 4000
        with torch.no_grad():
            prior.loss(
                torch.zeros(num, *SPATIAL),
                torch.zeros(num, *SPATIAL),
                uniform(0, "prior_uniform", 0, num),
                torch.zeros(num, dtype=torch.long),
            )
        dropped = seen["classes"] == 2
        assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
        for some in (dropped, ~dropped):
            logits = torch.logit(seen["times"][some])
            assert float(logits.mean()) == pytest.approx(0, abs=0.15)
            assert float(logits.std()) == pytest.approx(1, abs=0.12)

    def test_heun_is_of_second_order(self) -> None:
        """dx = x dt from t = 0 to 1 gives e · x."""
        prior = built("flow_matching", num_classes=0)
        prior.prepare(torch.zeros(2, *SPATIAL), torch.zeros(2, *SPATIAL), torch.zeros(2, dtype=torch.long))
        prior.network = Growing()
        noise = normal(0, "generate", 0, 2, SPATIAL)
        errors = []
        for prior.num_steps in (8, 16):
            errors.append(float((prior.sample(noise, torch.zeros(2), None) / noise - math.e).abs().max()))
        assert errors[0] < 0.01
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)

    def test_guidance_of_one_is_none_and_of_zero_forgets_the_class(self) -> None:
        prior = built("flow_matching")
        noise, shares, labels = normal(0, "generate", 0, 4, SPATIAL), torch.zeros(4), torch.tensor([0, 1, 0, 1])
        with torch.no_grad():
            plain = prior.sample(noise, shares, labels)
            prior.guidance = 1 + 1e-9
            torch.testing.assert_close(prior.sample(noise, shares, labels), plain, rtol=1e-3, atol=1e-4)
            prior.guidance = 0.0
            torch.testing.assert_close(prior.sample(noise, shares, labels), prior.sample(noise, shares, 1 - labels))
            prior.guidance = 3.0
            assert not torch.allclose(prior.sample(noise, shares, labels), plain, atol=1e-3)

    def test_autoguidance_of_one_is_none_and_of_zero_is_the_guide(self) -> None:
        prior = built("flow_matching", guide_channels=[32], guidance=1.5)
        noise, shares, labels = normal(0, "generate", 0, 4, SPATIAL), torch.zeros(4), torch.tensor([0, 1, 0, 1])
        with torch.no_grad():
            plain = prior.sample(noise, shares, labels)
            prior.autoguidance = 1 + 1e-9
            torch.testing.assert_close(prior.sample(noise, shares, labels), plain, rtol=1e-3, atol=1e-4)
            prior.autoguidance = 2.0
            u, v = prior.guide(noise, torch.zeros(4), labels), prior.velocity(noise, 0.0, labels)
            prior.autoguidance = 1.0
            torch.testing.assert_close(v, u + 2 * (prior.velocity(noise, 0.0, labels) - u), rtol=1e-4, atol=1e-5)
            prior.autoguidance, prior.network, prior.guidance = 0.0, Growing(), 1.0
            led = prior.sample(noise, shares, labels)
            prior.network, prior.autoguidance = prior.guide, 1.0
            torch.testing.assert_close(led, prior.sample(noise, shares, labels))

    def test_a_guide_learns_the_same_and_changes_neither_loss_nor_gradient_of_the_network(self) -> None:
        alone, led = built("flow_matching"), built("flow_matching", guide_channels=[32])
        led.network.load_state_dict(alone.network.state_dict())
        small = built("flow_matching", channels=[32])
        small.network.load_state_dict(led.guide.state_dict())
        draw = (normal(0, "grid", 0, 3, SPATIAL), normal(0, "generate", 0, 3, SPATIAL), torch.tensor([0.05, 0.4, 0.9]))
        losses = [prior.loss(*draw, torch.tensor([1, 0, 1])) for prior in (alone, led, small)]
        assert torch.equal(losses[0], losses[1])
        for loss in losses:
            loss.sum().backward()
        for found, expected in ((led.network, alone.network), (led.guide, small.network)):
            for one, other in zip(found.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad)

    @pytest.mark.parametrize(
        ("options", "num_classes", "told"),
        [
            ({"autoguidance": 2.0}, 2, "prior.autoguidance=2 needs a prior that was fitted with prior.guide_channels"),
            ({"guidance": 3.0}, 0, "prior.guidance=3 needs a prior that was fitted with prior.class_conditional"),
            ({"guidance": 3.0, "label_dropout": 0.0}, 2, "prior.label_dropout above 0"),
            ({"guide_channels": [8, 8, 8, 8]}, 2, "prior.guide_channels has 4 resolutions, which takes latents of a"),
        ],
    )
    def test_guidance_by_what_was_not_trained_is_refused(
        self, options: dict[str, object], num_classes: int, told: str
    ) -> None:
        with pytest.raises(UserError, match=told):
            built("flow_matching", num_classes=num_classes, **options)

    def test_it_learns_mean_and_covariance_of_each_class(self) -> None:
        shape = (2, 2, 2)
        config = PriorConfig(name="flow_matching", channels=[16], num_blocks=1, num_steps=8)
        prior = build_prior(config, shape, 2, 0)
        labels = torch.arange(4096) % 2
        latents = normal(0, "grid", 0, 4096, shape)
        latents[:, 1] = 0.8 * latents[:, 0] + 0.6 * latents[:, 1]
        latents = latents + torch.tensor([[2.0, 0.0], [-2.0, 1.0]])[labels][:, :, None, None]
        prior.prepare(latents, torch.full_like(latents, -20.0), labels)
        fit(prior, latents, labels, num_steps=200, lr=6e-3, size=128)
        for label in (0, 1):
            with torch.no_grad():
                noise, classes = normal(1, "generate", 0, 600, shape), torch.full((600,), label)
                drawn = prior.sample(noise, torch.zeros(600), classes)
            found, expected = (of.transpose(0, 1).flatten(1) for of in (drawn, latents[labels == label]))
            torch.testing.assert_close(found.mean(1), expected.mean(1), atol=0.15, rtol=0)
            torch.testing.assert_close(torch.cov(found), torch.cov(expected), atol=0.2, rtol=0)

    def test_a_new_network_gives_zero_and_all_of_it_learns(self) -> None:
        network = UNet((4, 8, 8), 3, [32, 64], 2)
        latents, times, classes = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
        assert not network(latents, times, classes).any()
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        network(latents, times, classes).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())

    def test_layout_does_not_matter(self) -> None:
        prior = built("flow_matching")
        noise, labels = normal(0, "generate", 0, 3, SPATIAL), torch.tensor([0, 1, 1])
        with torch.no_grad():
            plain = prior.sample(noise, torch.zeros(3), labels)
            prior.to(memory_format=torch.channels_last)
            torch.testing.assert_close(prior.sample(noise, torch.zeros(3), labels), plain, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("guide", [[], [32]])
    def test_the_loss_is_one_graph(self, guide: list[int]) -> None:
        """So it can be compiled whole, and captured in a CUDA graph: no branch depends on a tensor."""
        prior = built("flow_matching", guide_channels=guide)
        arguments = (torch.randn(2, *SPATIAL), torch.randn(2, *SPATIAL), torch.rand(2), torch.tensor([0, 1]))
        whole = torch.compile(prior, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(*arguments), prior(*arguments))


class Growing(torch.nn.Module):
    def forward(self, latents: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        return latents
