"""What every VAE here can do, and nothing about how."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cxr_vae.losses.elbo import LOGVAR_RANGE, Output
from cxr_vae.losses.likelihoods import LIKELIHOODS


class VAE(nn.Module, ABC):
    """A Gaussian encoder and a decoder that returns logits of the pixels.

    Where the likelihood has a scale, it is a parameter here, saved with the weights.
    """

    latent_shape: tuple[int, ...]
    """Of one image's latent, (D,) for vectors, (C, H, W) for spatial ones."""
    log_scale: nn.Parameter | None

    def __init__(self, likelihood: str = "bernoulli", num_classes: int = 0) -> None:
        super().__init__()
        self.likelihood = LIKELIHOODS[likelihood]
        self.num_classes = num_classes
        start = self.likelihood.start_log_scale
        self.register_parameter("log_scale", None if start is None else nn.Parameter(torch.tensor(start)))

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, H, W) in [0, 1] → the posterior's mean and log-variance, each (B, *latent_shape)."""

    @abstractmethod
    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, *latent_shape) → logits (B, 1, H, W), whose meaning is the likelihood's.

        A model of `num_classes` > 0 needs `labels` (B,) int64; another takes none.
        """

    def image(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, *latent_shape) → mean images (B, 1, H, W) in [0, 1], float32."""
        return self.likelihood.image(self.decode(latents, labels))

    def nll(self, latents: Tensor, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log p(images | latents), (B,) float32 nats an image."""
        logits = self.decode(latents, labels)
        return self.likelihood.nll(logits, images, self.pixel_log_scale(logits))

    def pixel_log_scale(self, logits: Tensor) -> Tensor:
        """The learned log scale of the pixels, () float32; 0 where there is none."""
        if self.log_scale is None:
            return logits.new_zeros((), dtype=torch.float32)
        return self.log_scale.clone()  # as the result of an operation: DDP looks for parameters behind those only

    def forward(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Output:
        """Encodes, draws z = μ + σ·ε with the standard normal `noise` as ε (B, *latent_shape), decodes."""
        mean, logvar = self.encode(images)
        # In float32 also under autocast: exp of a bf16 log-variance is off by up to a few per cent.
        mean, logvar = mean.float(), logvar.float().clamp(*LOGVAR_RANGE)
        latents = mean + torch.exp(0.5 * logvar) * noise
        logits = self.decode(latents, labels)
        return Output(logits, mean, logvar, self.pixel_log_scale(logits))

    def check_labels(self, labels: Tensor | None) -> None:
        """ValueError where labels are missing or nobody would look at them."""
        if (labels is None) != (self.num_classes == 0):
            does = "needs" if labels is None else "takes no"
            raise ValueError(f"a model of {self.num_classes} classes {does} labels")
