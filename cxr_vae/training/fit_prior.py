"""What `cxr-vae prior` does: fits a prior to the latents of the training split under a run's trained weights."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.config_file import override_config
from cxr_vae.data.dataset import check_classes, open_dataset, open_split
from cxr_vae.data.index import SplitIndex
from cxr_vae.distributed import World, world
from cxr_vae.errors import UserError
from cxr_vae.files import sha256_of
from cxr_vae.models import VAE, build_model
from cxr_vae.priors import Prior, build_prior
from cxr_vae.priors.files import Request, is_saved, save_prior
from cxr_vae.priors.gmm import MixturePrior
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import StopSignal
from cxr_vae.training.compilation import share_compiled
from cxr_vae.training.latents import LatentSet, encode_split
from cxr_vae.training.prior_training import PriorTraining, training_config
from cxr_vae.weights import check_trained_classes, load_vae

MAY_OVERRIDE = (
    *("prior", "checkpoint", "device", "data.shards", "data.split_file", "data.workers", "data.loading"),
    *("train.precision", "train.compile", "train.cuda_graph", "train.log_every", "train.max_minutes"),
)

Latents = tuple[Tensor, Tensor, Tensor]
"""Mean and log-variance (N, *latent_shape), class (N,)."""


def fit_prior(run: RunDir, overrides: Sequence[str] = ()) -> bool:
    """Fits the prior that the options name, on one or more ranks, as `run.prior(name)`; goes on where it was.

    What was fitted to the same weights and images with the same options already is not fitted again. Returns whether
    it was fitted: False where it was asked to stop, after saving a checkpoint. Raises UserError where weights or shards
    are missing, shards have another number of classes than the decoder is told of, or the prior is none for such
    latents: before anything is computed.
    """
    config = override_config(run.saved_config(), overrides, MAY_OVERRIDE)
    share_compiled()
    patience = timedelta(minutes=config.train.stall_minutes)
    with StopSignal(config.train.max_minutes) as stop, world(config.device, patience) as here:
        return _fit_prior(run, config, here, stop)


def check_prior(config: Config) -> None:
    """UserError where the prior is none for the network, both as configured: known before either is trained."""
    with torch.device("meta"):
        model = build_model(config)
        build_prior(config.prior, model.latent_shape, model.num_classes, config.seed)
    check_class_conditional(model, config)


def check_class_conditional(model: VAE, config: Config) -> None:
    """UserError where the prior is to know no classes and the decoder does."""
    if model.num_classes and not config.prior.class_conditional:
        raise UserError("prior.class_conditional=false: this model's decoder is told the class, so leave it true")


def _fit_prior(run: RunDir, config: Config, here: World, stop: StopSignal) -> bool:
    model, _ = load_vae(run.weights, here.device)
    index = open_split(config.data, config.data.train_split)
    check_classes(config, index)
    check_trained_classes(run.weights, index)
    request = request_of(run, config, model, index)
    if config.prior.name == "standard" and not request.classes:
        if here.is_main:
            print("the standard prior has nothing to fit: images are drawn from it as it is")
        return True
    prior = build_prior(config.prior, request.latent_shape, len(request.classes), config.seed)
    path = run.prior(config.prior.name)
    if here.broadcast(is_saved(path, request) if here.is_main else None):
        if here.is_main:
            print(f"{path}: already fitted so")
        return True
    latents = encode_split(model, open_dataset(config.data, index, here), here)
    if not prior.trained_by_gradient:
        if here.is_main:
            words = fit_in_closed_form(prior, latents, request)
            save_prior(path, prior, request, num_images=len(index))
            print(f"{config.prior.name}: {words}, fitted to {len(index)} images of the {index.split} split: {path}")
        here.barrier()
        return True
    prior.prepare(*latents)
    test_index = open_split(config.data, config.data.test_split)
    of_test = encode_split(model, open_dataset(config.data, test_index, here), here)
    sets = LatentSet(index, *latents, here.device), LatentSet(test_index, *of_test, here.device)
    folder = run.prior_training(config.prior.name, request.digest(config.train.precision, config.train.compile))
    training = training_config(config, folder)
    if here.is_main:
        folder.check(training)
    return PriorTraining(training, folder, here, prior, model, sets, request, run).run_to_end(stop)


def request_of(run: RunDir, config: Config, model: VAE, index: SplitIndex) -> Request:
    """What is asked for. A decoder that is told the class needs a prior that knows classes."""
    check_class_conditional(model, config)
    conditional = config.prior.class_conditional and (model.num_classes > 0 or config.prior.name != "standard")
    return Request(
        prior=config.prior,
        latent_shape=tuple(model.latent_shape),
        classes=tuple(index.classes) if conditional else (),
        weights_sha256=sha256_of(run.weights),
        index_sha256=index.content_hash,
        seed=config.seed,
    )


def fit_in_closed_form(prior: Prior, latents: Latents, request: Request) -> str:
    """Fits a prior that has no network; returns what came out, in words."""
    if isinstance(prior, MixturePrior):
        counts = prior.fit(*latents, request.seed, request.classes)
        named = zip(request.classes or ("all images",), counts, strict=True)
        return ", ".join(f"{count} component{'s' * (count > 1)} for {name}" for name, count in named)
    prior.prepare(*latents)
    return "class frequencies"
