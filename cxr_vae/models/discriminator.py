"""What tells patches of real images from those of reconstructions, trained from scratch beside the VAE."""

from itertools import pairwise

from torch import Tensor, nn

from cxr_vae.models.blocks import group_norm


class PatchDiscriminator(nn.Module):
    """PatchGAN: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, appendix 6.1.2.

    Three 4 × 4 convolutions of stride 2 and two of stride 1, leaky ReLU of slope 0.2: each logit sees 70 × 70 pixels.
    Group norm where theirs is batch norm, so that an image's logits don't depend on the others of the batch; weights
    from N(0, 0.02²) as there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for (num_in, num_out), stride in zip(
            pairwise([width, 2 * width, 4 * width, 8 * width]), (2, 2, 1), strict=True
        ):
            # Without a bias, which the norm's own would follow.
            layers.append(nn.Conv2d(num_in, num_out, 4, stride=stride, padding=1, bias=False))
            layers += [group_norm(num_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 1, H, W) in [0, 1] → what each convolution makes of them, the logits last.

        Features (B, C, h, w) after the leaky ReLU; logits (B, 1, H/8 - 2, W/8 - 2), high where a patch looks real.
        """
        maps, features = [], 2 * images - 1
        for layer in self.layers:
            features = layer(features)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(features)
        return [*maps, features]
