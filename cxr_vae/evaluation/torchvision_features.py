"""torchvision's classifiers as feature networks, from a weights file of your own: an example of a plug-in.

    cxr-vae evaluate RUN features=cxr_vae.evaluation.torchvision_features:densenet121 features_weights=densenet121.pth

The file holds the network's `state_dict`, such as torchvision's own or one you trained on X-rays.
"""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cxr_vae.errors import UserError


class Classifier(nn.Module):
    """A classifier without its last layer, with ImageNet's preprocessing."""

    preprocessing = "antialiased bilinear to 224 x 224, grey repeated to RGB, ImageNet's mean and deviation"

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, H, W) uint8 → features (B, D) float32."""
        resized = F.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=True)
        features: Tensor = self.network((resized.expand(-1, 3, -1, -1) - self.mean) / self.deviation)
        return features


def densenet121(weights: Path | None) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017): 1024 features."""
    return _without_head("densenet121", "classifier", weights)


def resnet50(weights: Path | None) -> nn.Module:
    """ResNet-50 (He et al. 2016): 2048 features."""
    return _without_head("resnet50", "fc", weights)


def _without_head(name: str, head: str, weights: Path | None) -> nn.Module:
    if weights is None:
        raise UserError(f"evaluate.features_weights should name a file with the state_dict of torchvision's {name}")
    network = torchvision.models.get_model(name, weights=None)
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{head}.")}
        missing, unknown = network.load_state_dict(tensors, strict=False)
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{weights} is not a state_dict of torchvision's {name} ({first})") from None
    if unknown or any(not key.startswith(f"{head}.") for key in missing):
        key = (*unknown, *(key for key in missing if not key.startswith(f"{head}.")))[0]
        raise UserError(f"{weights} is not a state_dict of torchvision's {name} (look at {key})")
    setattr(network, head, nn.Identity())
    return Classifier(network)
