"""Images to feature vectors, through torch-fidelity's Inception network or a user's: what figures are computed from.

A network of your own is a function, named as `package.module:function`, that takes the path of a weights file (or
None) and returns a module which maps images (B, 1, H, W) uint8 to features (B, D) float32; its attribute
`preprocessing` says in words what it does to them. torchvision_features.py is an example.
"""

import importlib
import inspect
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from cxr_vae.errors import UserError
from cxr_vae.evaluation import inception_weights
from cxr_vae.evaluation.block_store import hash_of
from cxr_vae.files import sha256_of

LAYERS = ["2048", "logits_unbiased"]
RANDOM_SEED = 0

AT_ONCE_ON_CPU = 8
"""Images whose activations its caches hold."""

NO_FID = (
    "WARNING: features=random: the figures come from the Inception architecture with random weights. They order sets "
    "of images only roughly, are no FID and compare with nothing but themselves (Naeem et al. 2020)."
)


class Features(NamedTuple):
    """Of N images, float32 on the CPU: what distances are taken between (N, D), Inception's pooled 2048 activations.

    And its class logits without bias (N, 1008); None of a network without classes, which has no score.
    """

    pooled: Tensor
    logits: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {"pooled": self.pooled} | ({} if self.logits is None else {"logits": self.logits})


@dataclass(frozen=True)
class FeatureNetwork:
    """A network by name with the hash of its weights, which belongs to every figure."""

    name: str
    weights_sha256: str
    module: nn.Module
    device: torch.device
    preprocessing: str = "torch-fidelity's bilinear as in TensorFlow 1, to 299 x 299"
    code_sha256: str | None = None
    """Of the file that a user's network is defined in: its code may change and its weights not."""

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of (B, 1, H, W) uint8 images, in float32; for Inception grey is repeated to RGB.

        Raises UserError where a user's network gives anything else than (B, D) finite numbers.
        """
        on_device = images.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(self.module, FeatureExtractorInceptionV3):
                at_once = AT_ONCE_ON_CPU if self.device.type == "cpu" else len(images)
                parts = [self.module(part.expand(-1, 3, -1, -1)) for part in on_device.split(at_once)]
                pooled, logits = (torch.cat(layer).cpu() for layer in zip(*parts, strict=True))
                return Features(pooled, logits)
            found = self.module(on_device)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images) or not found.isfinite().all():
            raise UserError(f"evaluate.features={self.name}: the network should give finite features (images, D)")
        return Features(found.float().cpu(), None)

    def facts(self) -> dict[str, Any]:
        """What has to stand beside a figure."""
        return {
            "network": self.name,
            "weights_sha256": self.weights_sha256,
            "dtype": "float32",
            "resize": self.preprocessing,
        } | ({} if self.code_sha256 is None else {"code_sha256": self.code_sha256})


def choose_network(wanted: str) -> str:
    """The name as it is, but for `auto`: `inception` if its weights are there or can be fetched within seconds.

    Raises UserError where `inception` was asked for and its weights are missing: before any other work is done.
    """
    if wanted == "random" or ":" in wanted:
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


def load_network(name: str, device: torch.device, weights: str | None = None) -> FeatureNetwork:
    """The `inception` network, the same with `random` weights, or a user's with its `weights` file.

    Raises UserError where a user's can't be found or doesn't load.
    """
    if ":" in name:
        return load_users_network(name, device, weights)
    if weights is not None:
        raise UserError(
            f"evaluate.features_weights={weights} is for a network of yours, and evaluate.features is {name}: leave it "
            "out; `cxr-vae fetch-weights` says where Inception's weights go"
        )
    module, sha256 = build_inception(name)
    return FeatureNetwork(name, sha256, fold_normalisation(module).to(device), device)


def build_inception(name: str) -> tuple[nn.Module, str]:
    """torch-fidelity's `inception` network, or the same with `random` weights, and the SHA-256 of the weights."""
    if name == "inception":
        path = inception_weights.require_weights()
        module: nn.Module = FeatureExtractorInceptionV3(name, LAYERS, feature_extractor_weights_path=str(path))
        return module, inception_weights.SHA256
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "nothing.pth"
        torch.save({}, nothing)
        module = RandomInception(name, LAYERS, feature_extractor_weights_path=str(nothing))
    return module, hash_of(module.state_dict())


def fold_normalisation(module: nn.Module) -> nn.Module:
    """The same function, to rounding, with each convolution's batch normalisation in its weights, and channels last.

    On a CPU, 8 images at a time, 2.3 times as fast as the network as it comes (benchmarks/evaluate.py).
    """
    for part in module.modules():
        if isinstance(part, BasicConv2d):
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
    return module.to(memory_format=torch.channels_last)


def load_users_network(name: str, device: torch.device, weights: str | None) -> FeatureNetwork:
    """The network that `package.module:function` returns for a weights file."""
    where, _, function = name.partition(":")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"evaluate.features_weights={weights}: no such file")
    try:
        defined_in = importlib.import_module(where)
        build = getattr(defined_in, function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"evaluate.features={name}: {error}; name a function that Python can import, as package.module:function"
        ) from None
    module = build(None if weights is None else Path(weights))
    if not isinstance(module, nn.Module):
        raise UserError(f"evaluate.features={name} gives a {type(module).__name__}, not a torch.nn.Module")
    module = module.to(device).eval()
    words = str(getattr(module, "preprocessing", "the network's own"))
    code = inspect.getsourcefile(defined_in)
    code_sha256 = sha256_of(Path(code)) if code else None
    return FeatureNetwork(name, hash_of(module.state_dict()), module, device, words, code_sha256)


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
