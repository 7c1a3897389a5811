"""`residual`: blocks with group norm, spatial latents, attention where the maps are smallest."""

from torch import Tensor, nn

from cxr_vae.config import Config
from cxr_vae.models.base import VAE
from cxr_vae.models.blocks import Attention, ResidualBlock, Upsample, group_norm


class ResidualVAE(VAE):
    """Residual VAE whose latents are a map; with the defaults 4 × 28 × 28 of 224 × 224 pixels.

    `channels[i]` is the width at side / 2**i. The encoder goes from the image to channels[1] at once, since blocks at
    full resolution cost most and bring least there; then blocks and 3 × 3 convolutions of stride 2 by turns, attention,
    and a 3 × 3 convolution to mean and log-variance. The decoder mirrors it with `Upsample` and has blocks at full
    resolution too. The form is that of Esser et al., "Taming Transformers", 2021, made small. The decoder's blocks are
    told the class.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.objective.likelihood, config.model.num_classes)
        widths, latent_channels, num_blocks = (
            config.model.channels,
            config.model.latent_channels,
            config.model.num_blocks,
        )
        assert latent_channels is not None
        assert num_blocks is not None
        self.latent_shape = (latent_channels, *[config.data.image_size >> (len(widths) - 1)] * 2)

        down: list[nn.Module] = [nn.Conv2d(1, widths[1], kernel_size=4, stride=2, padding=1)]
        for level, width in enumerate(widths[1:], start=1):
            if level > 1:
                down.append(nn.Conv2d(widths[level - 1], width, kernel_size=3, stride=2, padding=1))
            down += [ResidualBlock(width) for _ in range(num_blocks)]
        self.encoder = nn.Sequential(*down, Attention(widths[-1]), *_head(widths[-1], 2 * latent_channels))

        up: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1), Attention(widths[-1])]
        for level in range(len(widths) - 1, -1, -1):
            up += [ResidualBlock(widths[level], self.num_classes) for _ in range(num_blocks)]
            if level:
                up.append(Upsample(widths[level], widths[level - 1]))
        self.decoder = nn.ModuleList([*up, nn.Sequential(*_head(widths[0], 1))])

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See VAE.encode."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """See VAE.decode."""
        self.check_labels(labels)
        features = latents
        for layer in self.decoder:
            features = layer(features, labels) if isinstance(layer, ResidualBlock) else layer(features)
        return features


def _head(width: int, num_out: int) -> list[nn.Module]:
    return [group_norm(width), nn.SiLU(), nn.Conv2d(width, num_out, 3, padding=1)]
