"""Trained weights in one file that carries its configuration and runs no code when it is read (safetensors)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from cxr_vae.config import Config
from cxr_vae.config.section import Section
from cxr_vae.data.index import SplitIndex
from cxr_vae.errors import UserError
from cxr_vae.files import write_atomically
from cxr_vae.models import VAE, build_model

SectionT = TypeVar("SectionT", bound=Section)

PATHS: Any = {
    "run_dir": True,
    "resources": True,
    "data": {"source", "split_file", "shards"},
    "evaluate": {"features_weights"},
}
"""Of the configuration, what stays out of the file: paths and resources of the machine that trained."""

WORDS = {
    "missing": "is missing: it is written when training has finished",
    "damaged": "is not a file of trained weights, or damaged; delete it and train again, which writes it anew",
    "holds": "config",
}


def save_vae(path: Path, model: VAE, config: Config, **facts: str | int | list[str]) -> None:
    """Writes the weights with the configuration and `facts` (such as the step) as metadata, atomically."""
    save_weights(path, model, {"config": config.model_dump(exclude=PATHS), **facts})


def load_vae(path: str | Path, device: torch.device | str = "cpu") -> tuple[VAE, Config]:
    """The network in evaluation mode and its configuration, from a file that `save_vae` wrote."""
    config = understood(Config, facts_in(path, **WORDS)["config"], path)
    model = build_model(config)
    model.load_state_dict(load_file(path))
    # In this layout a CPU decodes 1.4 times as many images a second.
    return model.eval().to(device, memory_format=torch.channels_last), config  # type: ignore[call-overload]


def check_trained_classes(path: Path, index: SplitIndex) -> None:
    """UserError where the decoder was told of other classes than these shards have, or in another order."""
    facts = facts_in(path, **WORDS)
    trained = facts.get("classes", [])
    if facts["config"]["model"]["num_classes"] and trained and trained != list(index.classes):
        raise UserError(
            f"{path} was trained to be told {', '.join(trained)}, and {index.path.parent} has "
            f"{', '.join(index.classes)}: name the shards it was trained on with data.shards=…"
        )


def set_aside(path: Path) -> None:
    """Renames weights, if there are any, by their step: vae_step-0000000010.safetensors."""
    if not path.is_file():
        return
    path.rename(path.with_name(f"vae_step-{facts_in(path, **WORDS)['step']:010d}.safetensors"))


def save_weights(path: Path, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Writes the tensors of `module` with `facts`, which `facts_in` gives back, as metadata, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    # One entry: safetensors doesn't keep the order of several, and equal weights should give equal files.
    write_atomically(path, save(tensors, {"cxr_vae": json.dumps(facts, sort_keys=True)}))


def facts_in(path: str | Path, *, missing: str, damaged: str, holds: str) -> dict[str, Any]:
    """The facts in a file of weights; UserError, in these words, where it is missing, damaged or without `holds`."""
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["cxr_vae"])
        facts[holds]
    except FileNotFoundError:
        raise UserError(f"{path} {missing}") from None
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} {damaged}") from None
    return facts


def understood(kind: type[SectionT], options: Mapping[str, Any], path: str | Path) -> SectionT:
    """Options that a file carries; UserError where this version has other ones."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        options_of_it = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()}))
        raise UserError(
            f"{path} is of another version of cxr_vae, which took {options_of_it} otherwise: use that version"
        ) from None


def hyperparameters(config: Config, model: VAE) -> dict[str, str | int | float]:
    """What a paper's table of hyperparameters holds."""
    return {
        "model": config.model.name,
        "latent_dim": math.prod(model.latent_shape),
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "epochs": config.train.epochs,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "kl_weight": config.objective.kl_weight,
        "precision": config.train.precision,
        "seed": config.seed,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
