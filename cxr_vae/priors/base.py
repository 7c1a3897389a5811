"""What every prior here can do: give latents as a function of noise, and most of them a loss or a density."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cxr_vae.config import PriorConfig


class Prior(nn.Module, ABC):
    """A distribution over the latents of a trained network, of each class where `num_classes` isn't 0.

    Latents are the network's own outside and standardised inside: mean 0 and variance 1 over the training split, of
    each dimension of vectors (D,), and of spatial latents (C, H, W) in each place too, since chests lie alike.
    """

    centre: Tensor
    scale: Tensor
    class_shares: Tensor
    trained_by_gradient: ClassVar[bool] = False
    """Whether `loss` is what it is fitted by."""

    def __init__(self, config: PriorConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.latent_shape, self.num_classes = latent_shape, num_classes
        self.num_steps, self.guidance = config.num_steps, config.guidance
        self.register_buffer("centre", torch.zeros(latent_shape))
        self.register_buffer("scale", torch.ones(latent_shape))
        self.register_buffer("class_shares", torch.full((num_classes,), 1 / max(1, num_classes)))

    @torch.no_grad()
    def prepare(self, mean: Tensor, logvar: Tensor, labels: Tensor) -> None:
        """Takes the scale of the latents and the shares of the classes from the posteriors of the training split.

        `mean`, `logvar` (N, *latent_shape), `labels` (N,) int64. The variance is that of the aggregate posterior: of
        the means plus the mean of the posterior variances.
        """
        variance = mean.double().var(0, correction=0) + logvar.double().exp().mean(0)
        self.centre.copy_(mean.double().mean(0))
        self.scale.copy_(variance.sqrt().clamp(min=1e-6))
        if self.num_classes:
            counts = torch.bincount(labels, minlength=self.num_classes).double()
            self.class_shares.copy_(counts / counts.sum())

    def standardise(self, latents: Tensor) -> Tensor:
        """The network's latents (B, *latent_shape) → standardised ones, float32."""
        return (latents.float() - self.centre) / self.scale

    def restore(self, latents: Tensor) -> Tensor:
        """Standardised latents (B, *latent_shape) → the network's, float32."""
        return latents.float() * self.scale + self.centre

    def log_scale(self) -> Tensor:
        """() Log-determinant of `restore`: what a log-density of standardised latents loses."""
        return self.scale.log().sum()

    def draw_labels(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (n,) → classes (n,) int64, as frequent as in the training split."""
        return choose(self.class_shares.expand(len(uniform), -1), uniform)

    @abstractmethod
    def sample(self, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """Latents (n, *latent_shape) float32, a function of the arguments and the weights alone.

        `noise` (n, *latent_shape) standard normal, `uniform` (n,) in (0, 1), `labels` (n,) int64; None where
        `num_classes` is 0.
        """

    def loss(self, latents: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) float32, whose mean is minimised over the latents (B, *latent_shape) of the training split.

        `noise` and `uniform` are as in `sample`, of this step.
        """
        raise NotImplementedError(f"{type(self).__name__} is not fitted by gradient descent")

    def forward(self, latents: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """The loss: what DistributedDataParallel and torch.compile wrap."""
        return self.loss(latents, noise, uniform, labels)


def choose(shares: Tensor, uniform: Tensor) -> Tensor:
    """Which of K, by inversion of the distribution function: shares (n, K) and uniform (n,) → (n,) int64."""
    cumulative = shares.double().cumsum(1)
    drawn = uniform.double()[:, None] * cumulative[:, -1:]
    return (drawn >= cumulative).sum(1).clamp(max=shares.shape[1] - 1)


def normal_log_density(noise: Tensor) -> Tensor:
    """(B,) log N(noise; 0, 1) in nats, summed over all dimensions."""
    flat = noise.flatten(1)
    return -0.5 * (flat.square() + math.log(2 * math.pi)).sum(1)
