import numpy as np
import pytest
import torch
from torch import Tensor

from cxr_vae.config import PriorConfig
from cxr_vae.errors import UserError
from cxr_vae.noise import normal, uniform
from cxr_vae.priors import PRIORS, Prior, build_prior
from cxr_vae.priors.base import choose
from cxr_vae.priors.files import Request, is_saved, load_prior, save_prior
from cxr_vae.priors.flow import FlowPrior
from cxr_vae.priors.gmm import MixturePrior, fit_mixture

SMALL = {"channels": [32, 32], "num_blocks": 1, "width": 32, "num_steps": 4}
SPATIAL, VECTOR = (2, 4, 4), (5,)


def built(name: str, *, num_classes: int = 2, **options: object) -> Prior:
    config = PriorConfig(name=name, **(SMALL | options))
    prior = build_prior(config, SPATIAL if name == "flow_matching" else VECTOR, num_classes, seed=3)
    return shaken(prior) if prior.trained_by_gradient else prior


def shaken(prior: Prior) -> Prior:
    """With weights that are none of the zeros a network starts from."""
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    prior.centre += 0.3
    prior.scale *= torch.linspace(0.5, 2, prior.scale.numel()).view_as(prior.scale)
    return prior


def posteriors(shape: tuple[int, ...], num: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Two classes with means apart; one dimension (or channel) that nothing is encoded in."""
    labels = torch.arange(num) % 3 // 2  # a third are of class 1
    mean = normal(5, "grid", 0, num, shape) + 3 * labels.view(-1, *[1] * len(shape))
    mean[:, 0] *= 0.001
    logvar = torch.full_like(mean, -4.0)
    logvar[:, 0] = 0.0
    return mean, logvar, labels


class TestEveryPrior:
    """What the samplers rely on."""

    @pytest.mark.parametrize("name", PRIORS)
    @pytest.mark.parametrize("num_classes", [0, 2])
    def test_a_sample_is_a_function_of_its_noise(self, name: str, num_classes: int) -> None:
        prior = built(name, num_classes=num_classes)
        prior.prepare(*posteriors(prior.latent_shape))
        noise, shares = normal(0, "generate", 0, 12, prior.latent_shape), uniform(0, "component", 0, 12)
        labels = torch.arange(12) % 2 if num_classes else None
        with torch.no_grad():
            whole = prior.sample(noise, shares, labels)
            torch.manual_seed(1)
            parts = [
                prior.sample(noise[a:b], shares[a:b], None if labels is None else labels[a:b])
                for a, b in ((0, 5), (5, 12))
            ]
            assert torch.equal(prior.sample(noise, shares, labels), whole)
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
        assert (whole.dtype, whole.shape) == (torch.float32, noise.shape)

    @pytest.mark.parametrize("shape", [VECTOR, SPATIAL])
    def test_the_scale_is_that_of_draws_from_the_posteriors(self, shape: tuple[int, ...]) -> None:
        mean, logvar, labels = posteriors(shape, 3000)
        prior = build_prior(PriorConfig(name="standard"), shape, 2, 0)
        prior.prepare(mean, logvar, labels)
        draws = mean + (0.5 * logvar).exp() * normal(1, "posterior", 0, len(mean), shape)
        inside = prior.standardise(draws)
        torch.testing.assert_close(inside.mean(0), torch.zeros(shape), atol=0.08, rtol=0)
        torch.testing.assert_close(inside.std(0), torch.ones(shape), atol=0.05, rtol=0)
        torch.testing.assert_close(prior.restore(inside), draws)
        torch.testing.assert_close(prior.class_shares, torch.tensor([2 / 3, 1 / 3]), atol=1e-3, rtol=0)

    def test_classes_are_as_frequent_as_in_training(self) -> None:
        prior = built("standard")
        prior.class_shares.copy_(torch.tensor([0.2, 0.8]))
        drawn = prior.draw_labels(uniform(0, "label", 0, 4000))
        assert float(drawn.float().mean()) == pytest.approx(0.8, abs=0.03)

    def test_choosing_inverts_the_distribution_function(self) -> None:
        shares = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).expand(5, -1)
        drawn = choose(shares, torch.tensor([1e-7, 0.24, 0.26, 0.76, 1 - 1e-7]))
        assert drawn.tolist() == [0, 0, 1, 3, 3]

    @pytest.mark.parametrize(
        ("name", "shape", "said"),
        [
            ("gmm", (4, 28, 28), "use prior.name=flow_matching"),
            ("gmm", (600,), "use prior.name=flow"),
            ("flow", (4, 28, 28), "use prior.name=flow_matching"),
            ("flow", (1,), "use prior.name=gmm"),
            ("flow_matching", (128,), "use prior.name=gmm or flow"),
            ("flow_matching", (4, 7, 7), "a side divisible by 2"),
        ],
    )
    def test_latents_it_is_not_for_are_refused(self, name: str, shape: tuple[int, ...], said: str) -> None:
        with pytest.raises(UserError, match=said):
            build_prior(PriorConfig(name=name), shape, 0, 0)


class TestMixture:
    """gmm."""

    def test_samples_have_the_moments_of_draws_from_each_class(self) -> None:
        prior = built("gmm")
        assert isinstance(prior, MixturePrior)
        mean, logvar, labels = posteriors(VECTOR, 1500)
        prior.fit(mean, logvar, labels, seed=0)
        for label in (0, 1):
            chosen = mean[labels == label]
            expected = torch.cov(chosen.T) + torch.diag(logvar[0].exp())
            drawn = prior.sample(
                normal(2, "generate", 0, 4000, VECTOR),
                uniform(2, "component", 0, 4000),
                torch.full((4000,), label),
            )
            torch.testing.assert_close(drawn.mean(0), chosen.mean(0), atol=0.12, rtol=0)
            torch.testing.assert_close(torch.cov(drawn.T), expected, atol=0.15, rtol=0)

    def test_the_number_of_components_is_that_of_the_data(self) -> None:
        rng = np.random.default_rng(0)
        centres = np.array([[0.0, 0], [9, 0], [0, 9], [9, 9]])
        points = centres[rng.integers(4, size=400), None] + rng.normal(size=(400, 4, 2))
        assert fit_mixture(points, None, 0).n_components == 4
        assert fit_mixture(rng.normal(size=(400, 4, 2)), None, 0).n_components <= 2
        assert fit_mixture(points, 3, 0).n_components == 3

    def test_a_class_with_too_few_images_is_named(self) -> None:
        mean, logvar, _ = posteriors(VECTOR, 60)
        prior = built("gmm")
        assert isinstance(prior, MixturePrior)
        with pytest.raises(UserError, match="class B has 5 training images, too few"):
            prior.fit(mean, logvar, (torch.arange(60) < 5).long(), 0, ["A", "B"])
        prior.num_components = 40
        with pytest.raises(UserError, match=r"class A has 30 training images, .*: use fewer prior\.num_components"):
            prior.fit(mean, logvar, (torch.arange(60) < 30).long(), 0, ["A", "B"])


class TestFlow:
    """flow."""

    @pytest.mark.parametrize("num_classes", [0, 2])
    def test_log_determinant_is_autograds_and_the_inverse_is_one(self, num_classes: int) -> None:
        prior = built("flow", num_classes=num_classes, num_layers=3)
        assert isinstance(prior, FlowPrior)
        at = normal(0, "grid", 0, 4, VECTOR)
        labels = torch.tensor([0, 1, 1, 0]) if num_classes else None
        noise, log_det = prior.to_noise(at, labels)
        for row in range(4):
            of_row = None if labels is None else labels[row : row + 1]

            def alone(point: Tensor, label: Tensor | None = of_row) -> Tensor:
                return prior.to_noise(point[None], label)[0][0]

            jacobian = torch.autograd.functional.jacobian(alone, at[row])
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[row], rtol=0, atol=1e-4)
        torch.testing.assert_close(prior.sample(noise, torch.zeros(4), labels), at, rtol=1e-4, atol=1e-5)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1) + log_det
        torch.testing.assert_close(prior.loss(at, noise, torch.zeros(4), labels), -expected)

    def test_it_learns_what_no_normal_is(self) -> None:
        """A parabola: E[y | x] = x²."""
        config = PriorConfig(name="flow", num_layers=4, width=32)
        prior = build_prior(config, (2,), 0, 0)
        points = normal(0, "grid", 0, 2048, (2,))
        points[:, 1] = points[:, 0].square() + 0.3 * points[:, 1]
        prior.prepare(points, torch.full_like(points, -20.0), torch.zeros(len(points), dtype=torch.long))
        fit(prior, points, None, num_steps=300, lr=5e-3)
        with torch.no_grad():
            drawn = prior.sample(normal(1, "generate", 0, 2000, (2,)), torch.zeros(2000), None)
        away = drawn[:, 1] - drawn[:, 0].square()
        assert float(away.mean().abs()) < 0.1
        assert float(away.std()) < 0.6  # 0.3, and 1.4 of a normal with the same covariance


def fit(prior: Prior, latents: Tensor, labels: Tensor | None, *, num_steps: int, lr: float, size: int = 256) -> None:
    optimizer = torch.optim.Adam(prior.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        start = step * size
        rows = torch.arange(start, start + size) % len(latents)
        noise = normal(0, "prior_noise", start, start + size, prior.latent_shape)
        shares = uniform(0, "prior_uniform", start, start + size)
        loss = prior(latents[rows], noise, shares, None if labels is None else labels[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class TestFiles:
    """What is saved."""

    def request(self, name: str, **changes: object) -> Request:
        options = PriorConfig(name=name, **SMALL)
        facts = {"weights_sha256": "a" * 64, "index_sha256": "b" * 64, "seed": 3} | changes
        return Request(options, SPATIAL if name == "flow_matching" else VECTOR, ("A", "B"), **facts)

    @pytest.mark.parametrize("name", PRIORS)
    def test_a_saved_prior_gives_the_same_latents(self, name: str, tmp_path) -> None:
        prior, request = built(name), self.request(name)
        if isinstance(prior, MixturePrior):
            prior.num_components = 3
            prior.fit(*posteriors(VECTOR), 0)
        path = tmp_path / "priors" / f"{name}.safetensors"
        save_prior(path, prior, request)
        loaded, facts = load_prior(path, request.prior, "a" * 64)
        noise, shares, labels = normal(0, "generate", 0, 6, prior.latent_shape), torch.rand(6), torch.arange(6) % 2
        with torch.no_grad():
            found, expected = (one.sample(noise, shares, labels) for one in (loaded, prior.eval()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert facts["classes"] == ["A", "B"]
        assert is_saved(path, request)
        for other in (self.request(name, seed=4), self.request(name, weights_sha256="c" * 64)):
            assert not is_saved(path, other)
        with pytest.raises(UserError, match="was fitted to other weights"):
            load_prior(path, request.prior, "c" * 64)

    def test_how_it_is_drawn_from_is_settled_later(self, tmp_path) -> None:
        path = tmp_path / "p.safetensors"
        save_prior(path, built("flow_matching"), self.request("flow_matching"))
        sampling = PriorConfig(num_steps=7, guidance=2.5)
        prior, _ = load_prior(path, sampling, "a" * 64)
        assert (prior.num_steps, prior.guidance) == (7, 2.5)
        with pytest.raises(UserError, match="needs a prior that was fitted with prior"):
            load_prior(path, PriorConfig(autoguidance=2), "a" * 64)

    def test_damaged_and_foreign_files_are_refused(self, tmp_path) -> None:
        path = tmp_path / "p.safetensors"
        path.write_bytes(b"nothing")
        for ask in (lambda: load_prior(path, PriorConfig(), "a"), lambda: is_saved(path, self.request("gmm"))):
            with pytest.raises(UserError, match="is not a file of a prior, or damaged"):
                ask()
