"""Images of a trained model by number: which prior they are drawn from, of which class, and what they depend on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.config_file import SAMPLING
from cxr_vae.errors import UserError
from cxr_vae.files import sha256_of
from cxr_vae.models import VAE
from cxr_vae.noise import BLOCK, normal, uniform
from cxr_vae.pictures import to_uint8
from cxr_vae.priors import Prior, build_prior
from cxr_vae.priors.files import load_prior
from cxr_vae.run_dir import RunDir


@dataclass(frozen=True)
class Sampler:
    """Image i is a function of (weights, prior, seed, temperature, label, i)."""

    model: VAE
    prior: Prior
    seed: int
    temperature: float
    label: int | None
    """The class all images are of; None: as frequent as in the training split, where the prior knows classes."""
    facts: dict[str, Any]
    """What the images are a function of, beside their number."""

    @torch.inference_mode()
    def draw(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Samples start…stop as (n, 1, H, W) uint8 on the CPU; one block at the most.

        `start` is the first of a block, and a whole block is computed whatever is asked for, so that a sample has the
        same bits however many there are and whichever rank draws it. Raises UserError where the model gives what is no
        number.
        """
        labels = self.labels(start, device)
        latents = self.latents(start, labels, device)
        images = self.model.image(latents, labels if self.model.num_classes else None)
        if not images.isfinite().all():
            raise UserError("the trained weights give images of values that are no finite numbers: train again")
        return to_uint8(images)[: stop - start].cpu()

    def latents(self, start: int, labels: Tensor | None, device: torch.device) -> Tensor:
        """The latents (64, *latent_shape) of a block, of its classes."""
        stop = start + BLOCK
        noise = self.temperature * normal(self.seed, "generate", start, stop, self.model.latent_shape, device)
        component = uniform(self.seed, "component", start, stop, device)
        return self.prior.sample(noise, component, labels)

    def labels(self, start: int, device: torch.device) -> Tensor | None:
        """The classes (64,) int64 of a block; None where the prior knows none."""
        if not self.prior.num_classes:
            return None
        if self.label is not None:
            return torch.full((BLOCK,), self.label, device=device)
        return self.prior.draw_labels(uniform(self.seed, "label", start, start + BLOCK, device))


def open_sampler(
    run: RunDir,
    model: VAE,
    config: Config,
    device: torch.device,
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    label: str | None = None,
) -> Sampler:
    """What draws images from the prior that `config` names, of class `label` if one is given.

    Raises UserError where the prior isn't fitted yet, was fitted to other weights, or doesn't know the class.
    """
    seed = config.seed if seed is None else seed
    options, path, classes = config.prior, run.prior(config.prior.name), []
    normal = "standard normal" if temperature == 1 else f"normal of standard deviation {temperature:g}"
    facts: dict[str, Any] = {"weights_sha256": sha256_of(run.weights), "seed": seed, "prior": normal}
    if options.name == "standard" and not model.num_classes:
        prior = build_prior(options, model.latent_shape, 0, seed).to(device)
    elif not path.is_file():
        raise UserError(
            f"{run.path} has no {options.name} prior yet: fit it with `cxr-vae prior {run.path} name={options.name}`"
        )
    else:
        prior, of_file = load_prior(path, options, facts["weights_sha256"], device)
        classes = of_file["classes"]
        facts |= {"prior": options.name, "prior_sha256": sha256_of(path), "temperature": temperature, "label": label}
    if options.name == "flow_matching":
        facts |= {name: getattr(options, name) for name in SAMPLING}
    return Sampler(model, prior, seed, temperature, class_number(label, classes, options.name), facts)


def class_number(label: str | None, classes: list[str], prior: str) -> int | None:
    """Of a class by its name; UserError where there is none of this name."""
    if label is None:
        return None
    if not classes:
        raise UserError(f"label {label}: the {prior} prior of this run knows no classes; leave the label out")
    if label not in classes:
        raise UserError(f"label {label}: there is no such class; there are {', '.join(classes)}")
    return classes.index(label)
