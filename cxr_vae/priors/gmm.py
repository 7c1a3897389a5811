"""`gmm`: a mixture of normals with full covariances, one a class, for latent vectors.

Fitted by expectation maximisation (scikit-learn) to draws from the posteriors, z ~ q(z|x), and not to their means: the
decoder was trained on draws, and what a mixture should match is the aggregate posterior (Tomczak and Welling, 2018),
whose covariance the means lack. A unit the encoder doesn't use has means that hardly vary, and draws that are N(0, 1).
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr_vae.config import PriorConfig
from cxr_vae.errors import UserError
from cxr_vae.noise import normal, seed_of
from cxr_vae.priors.base import Prior, choose

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MOST_DIMENSIONS = 512
"""A component has D² / 2 numbers: beyond this there are more of them than images to tell them from."""

CANDIDATES = (1, 2, 4, 8, 16, 32)
"""Numbers of components to choose among."""

DRAWS = 4
"""From each posterior."""

HELD_OUT = 10
"""Every tenth image, with all its draws, judges the numbers of components."""

Matrix = npt.NDArray[np.float64]


class MixturePrior(Prior):
    """p(z|y) = Σ w N(z; μ, L Lᵀ), of K components a class (the largest K; those a class hasn't got have weight 0)."""

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        if len(latent_shape) > 1 or latent_shape[0] > MOST_DIMENSIONS:
            raise UserError(
                f"prior.name=gmm is for latent vectors of up to {MOST_DIMENSIONS} dimensions, and this model's latents "
                f"are {' x '.join(map(str, latent_shape))}: use prior.name="
                f"{'flow_matching' if len(latent_shape) > 1 else 'flow'}"
            )
        super().__init__(config, latent_shape, num_classes)
        self.num_components = config.num_components
        self._make_room(config.num_components or 1)

    def _make_room(self, num_components: int) -> None:
        groups, size = max(1, self.num_classes), self.latent_shape[0]
        device = self.centre.device
        self.register_buffer("weights", torch.full((groups, num_components), 1 / num_components, device=device))
        self.register_buffer("means", torch.zeros(groups, num_components, size, device=device))
        self.register_buffer("factors", torch.eye(size, device=device).repeat(groups, num_components, 1, 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self._make_room(state_dict[prefix + "weights"].shape[1])  # as many as were chosen
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def fit(self, mean: Tensor, logvar: Tensor, labels: Tensor, seed: int, names: Sequence[str] = ()) -> list[int]:
        """Fits a mixture a class to the posteriors (N, D) of images of classes (N,); returns their numbers of normals.

        Raises UserError where a class has too few images; `names` are the classes', for that.
        """
        self.prepare(mean, logvar, labels)
        noise = normal(seed, "posterior", 0, DRAWS * len(mean), self.latent_shape).view(len(mean), DRAWS, -1)
        latents = mean.cpu().float()[:, None] + logvar.cpu().float().mul(0.5).exp()[:, None] * noise
        points = ((latents - self.centre.cpu()) / self.scale.cpu()).double().numpy()
        of_class = labels.cpu().numpy() if self.num_classes else np.zeros(len(mean), np.int64)
        mixtures = []
        for label in range(max(1, self.num_classes)):
            chosen = points[of_class == label]
            needed = max(2 * HELD_OUT, self.num_components or 0)
            if len(chosen) < needed:
                other = "fewer prior.num_components" if needed > 2 * HELD_OUT else "prior.name=standard"
                what = f"class {names[label]}" if names and self.num_classes else "the split"
                raise UserError(
                    f"{what} has {len(chosen)} training images, too few for a mixture (it takes {needed}): "
                    f"use {other}, or, where model.num_classes=0, prior.class_conditional=false"
                )
            mixtures.append(fit_mixture(chosen, self.num_components, seed_of(seed, "component", label) % 2**32))
        self._take(mixtures)
        return [mixture.n_components for mixture in mixtures]

    def _take(self, mixtures: Sequence["GaussianMixture"]) -> None:
        self._make_room(max(mixture.n_components for mixture in mixtures))
        self.weights.zero_()
        for label, mixture in enumerate(mixtures):
            count = mixture.n_components
            factors = np.linalg.cholesky(mixture.covariances_)
            for buffer, values in zip(
                (self.weights, self.means, self.factors), (mixture.weights_, mixture.means_, factors), strict=True
            ):
                buffer[label, :count] = torch.from_numpy(values).to(buffer)

    def sample(self, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.sample: `uniform` chooses the component."""
        groups = torch.zeros(len(noise), dtype=torch.long, device=noise.device) if labels is None else labels
        component = choose(self.weights[groups], uniform)
        spread = torch.einsum("nij,nj->ni", self.factors[groups, component], noise.float())
        return self.restore(self.means[groups, component] + spread)


def fit_mixture(points: npt.NDArray[np.float64], num_components: int | None, seed: int) -> "GaussianMixture":
    """A mixture for the draws (N, DRAWS, D) of N images, with the best of CANDIDATES where no number is asked for.

    Best: the highest mean log-density of the draws of every tenth image, of a mixture fitted to the others'. The
    chosen number is then fitted to all.
    """
    everything = points.reshape(-1, points.shape[-1])
    if num_components is not None:
        return _fitted(everything, num_components, seed)
    held_out = np.arange(len(points)) % HELD_OUT == 0
    learnt, judged = (points[mask].reshape(-1, points.shape[-1]) for mask in (~held_out, held_out))
    scores: list[tuple[float, int]] = []
    for count in CANDIDATES:
        if 2 * count > len(learnt) // DRAWS:
            break
        scores.append((float(_fitted(learnt, count, seed).score(judged)), -count))
        if scores[-1] < max(scores):  # it gets worse from here on
            break
    return _fitted(everything, -max(scores)[1], seed)


def _fitted(points: Matrix, num_components: int, seed: int) -> "GaussianMixture":
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 100 rounds it is as good as it gets
        return GaussianMixture(num_components, random_state=seed, reg_covar=1e-5).fit(points)
