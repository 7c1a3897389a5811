"""A fitted prior as a file beside the weights it belongs to: safetensors with its configuration and their SHA-256."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cxr_vae.config import PriorConfig
from cxr_vae.config_file import SAMPLING
from cxr_vae.errors import UserError
from cxr_vae.priors import PRIORS, Prior
from cxr_vae.weights import facts_in, save_weights, understood

WORDS = {
    "missing": "is missing: fit it with `cxr-vae prior`",
    "damaged": "is not a file of a prior, or damaged; delete it and fit it again with `cxr-vae prior`",
    "holds": "prior",
}


@dataclass(frozen=True)
class Request:
    """What a fitted prior is a function of."""

    prior: PriorConfig
    latent_shape: tuple[int, ...]
    classes: tuple[str, ...]
    """Names by number; empty where it knows none."""
    weights_sha256: str
    """Of the file of the network whose latents these are."""
    index_sha256: str
    """Of the training split."""
    seed: int

    def facts(self) -> dict[str, Any]:
        """As they stand in the file."""
        lists = {"latent_shape": list(self.latent_shape), "classes": list(self.classes)}
        return vars(self) | lists | {"prior": self.prior.model_dump(exclude=set(SAMPLING))}

    def digest(self, *more: str) -> str:
        """The SHA-256 of the facts, and of what else a training is not resumed with another of."""
        return hashlib.sha256(json.dumps([self.facts(), *more], sort_keys=True).encode()).hexdigest()


def save_prior(path: Path, prior: Prior, request: Request, **facts: str | int | float) -> None:
    """Writes a fitted prior, atomically; `facts` are noted beside the request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, prior, {**request.facts(), "facts": facts})


def is_saved(path: Path, request: Request) -> bool:
    """Whether the file holds what is asked for."""
    if not path.is_file():
        return False
    facts = facts_in(path, **WORDS)
    return {name: facts.get(name) for name in request.facts()} == request.facts()


def load_prior(
    path: Path, sampling: PriorConfig, weights_sha256: str, device: torch.device | str = "cpu"
) -> tuple[Prior, Mapping[str, Any]]:
    """The prior in evaluation mode, to be drawn from as `sampling` says, and the facts in its file.

    Raises UserError where the file is missing or damaged, or the prior belongs to other weights.
    """
    facts = facts_in(path, **WORDS)
    of_sampling = {name: getattr(sampling, name) for name in SAMPLING}
    config = understood(PriorConfig, facts["prior"] | of_sampling, path)
    prior = PRIORS[config.name](config, tuple(facts["latent_shape"]), len(facts["classes"]))
    prior.load_state_dict(load_file(path))
    if facts["weights_sha256"] != weights_sha256:
        raise UserError(
            f"{path} was fitted to other weights (SHA-256 {facts['weights_sha256'][:12]}…, not "
            f"{weights_sha256[:12]}…): fit it again with `cxr-vae prior`"
        )
    prior = prior.eval().requires_grad_(False).to(device)
    if prior.trained_by_gradient:  # in this layout convolutions are faster
        prior = prior.to(memory_format=torch.channels_last)
    return prior, facts
