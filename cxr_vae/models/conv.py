"""`conv`, the reference: stride-2 convolutions with batch norm down to a vector, and their mirror back."""

from itertools import pairwise

from torch import Tensor, nn

from cxr_vae.config import Config
from cxr_vae.models.base import VAE
from cxr_vae.models.blocks import group_norm


class ConvVAE(VAE):
    """Convolutional VAE with a latent vector; with the defaults 224 → 7 pixels a side and 15,235,137 parameters.

    Each stage of the encoder halves the side (4 × 4 kernels, stride 2), normalisation, ReLU; two linear heads give
    mean and log-variance; a linear layer and the mirrored transposed convolutions lead back, the last to one channel
    of logits without norm. Group norm (Wu and He, 2018) with 8 groups, or as many as divide the width. The decoder is
    told a class by a learned vector, 0 at first, that is added to the latent one.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.objective.likelihood, config.model.num_classes)
        widths, norm, latent_dim = config.model.channels, config.model.norm, config.model.latent_dim
        assert latent_dim is not None
        self.latent_shape = (latent_dim,)
        self.smallest = (widths[-1], *[config.data.image_size >> len(widths)] * 2)
        num_features = self.smallest[0] * self.smallest[1] * self.smallest[2]

        self.encoder = nn.Sequential(
            *(_stage(nn.Conv2d(a, b, 4, stride=2, padding=1), norm, b) for a, b in pairwise([1, *widths])),
            nn.Flatten(),
        )
        self.to_mean = nn.Linear(num_features, latent_dim)
        self.to_logvar = nn.Linear(num_features, latent_dim)
        back = widths[::-1]
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, num_features),
            nn.Unflatten(1, self.smallest),
            *(_stage(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), norm, b) for a, b in pairwise(back)),
            nn.ConvTranspose2d(back[-1], 1, kernel_size=4, stride=2, padding=1),
        )
        self.classes = nn.Embedding(self.num_classes, latent_dim) if self.num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See VAE.encode."""
        features = self.encoder(images)
        return self.to_mean(features), self.to_logvar(features)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """See VAE.decode."""
        self.check_labels(labels)
        if self.classes is not None:
            latents = latents + self.classes(labels)
        logits: Tensor = self.decoder(latents)
        return logits


def _stage(convolution: nn.Module, norm: str, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(width) if norm == "batch" else group_norm(width), nn.ReLU())
