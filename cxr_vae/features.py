"""Images to feature vectors, through torch-fidelity's Inception network: what every figure is computed from."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from cxr_vae import inception_weights
from cxr_vae.errors import UserError

LAYERS = ["2048", "logits_unbiased"]
RANDOM_SEED = 0

NO_FID = (
    "WARNING: features=random: the figures come from the Inception architecture with random weights. They order sets "
    "of images only roughly, are no FID and compare with nothing but themselves (Naeem et al. 2020)."
)


class Features(NamedTuple):
    """Of N images: pooled activations (N, 2048) and class logits without bias (N, 1008), float32 on the CPU."""

    pooled: Tensor
    logits: Tensor


@dataclass(frozen=True)
class FeatureNetwork:
    """A network by name with the hash of its weights, which belongs to every figure."""

    name: str
    weights_sha256: str
    module: nn.Module
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of (B, 1, H, W) uint8 images: grey repeated to RGB, torch-fidelity's resize, float32."""
        colour = images.to(self.device).expand(-1, 3, -1, -1)
        with torch.autocast(self.device.type, enabled=False):
            pooled, logits = self.module(colour)
        return Features(pooled.cpu(), logits.cpu())

    def facts(self) -> dict[str, Any]:
        """What has to stand beside a figure."""
        return {
            "network": self.name,
            "weights_sha256": self.weights_sha256,
            "dtype": "float32",
            "resize": "torch-fidelity's bilinear as in TensorFlow 1, to 299 x 299",
        }


def choose_network(wanted: str) -> str:
    """`inception` or `random`; for `auto` the first if its weights are there or can be fetched within seconds.

    Raises UserError where `inception` was asked for and its weights are missing: before any other work is done.
    """
    if wanted == "random":
        return wanted
    if wanted == "inception":
        inception_weights.require_weights()
        return wanted
    if inception_weights.find_weights():
        return "inception"
    try:
        inception_weights.fetch_weights(timeout_s=10, within_s=10)
    except UserError as error:
        reason = str(error).partition(": run ")[0]
        print(f"features=auto: no Inception weights here ({reason}); random ones instead", flush=True)
        return "random"
    return "inception"


def load_network(name: str, device: torch.device) -> FeatureNetwork:
    """The `inception` network, or the same with `random` weights."""
    if name == "inception":
        path = inception_weights.require_weights()
        module: nn.Module = FeatureExtractorInceptionV3(name, LAYERS, feature_extractor_weights_path=str(path))
        sha256 = inception_weights.SHA256
    else:
        with tempfile.TemporaryDirectory() as folder:
            nothing = Path(folder) / "nothing.pth"
            torch.save({}, nothing)
            module = RandomInception(name, LAYERS, feature_extractor_weights_path=str(nothing))
        sha256 = hash_of(module.state_dict())
    # On a CPU this layout is 1.5 times as fast, with the same features to 1e-6.
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureNetwork(name, sha256, module, device)


class RandomInception(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The Inception architecture with weights drawn from a fixed seed (He et al. 2015), where others load theirs."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Ignores its argument: torch-fidelity's constructor calls this to load, we draw."""
        source = torch.Generator().manual_seed(RANDOM_SEED)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
