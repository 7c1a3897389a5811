"""Training of a prior that has a network, by the loop that trains VAEs."""

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cxr_vae.config import Config, ObjectiveConfig, OptimizerConfig
from cxr_vae.distributed import World
from cxr_vae.models import VAE
from cxr_vae.noise import normal, uniform
from cxr_vae.pictures import save_grid
from cxr_vae.precision import autocast
from cxr_vae.priors import Prior
from cxr_vae.priors.files import Request, save_prior
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.sampler import Sampler
from cxr_vae.training.latents import LatentSet
from cxr_vae.training.loop import Loop
from cxr_vae.training.step import Step

NUM_PICTURES = 10
"""Grids of samples over the training of a prior."""

TEST_BATCH = 256


class PriorStep(Step):
    """Batches: posteriors (b, 2, *latent_shape), noise for them, noise and a uniform number for the prior, classes."""

    def losses(
        self, batch: Sequence[Tensor], kl_weight: Tensor | float, *, last: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """See Step.losses: the prior's; a latent is drawn anew from its posterior at each use."""
        posteriors, of_posterior, noise, uniform, labels = batch
        mean, logvar = posteriors.unbind(1)
        latents = mean + torch.exp(0.5 * logvar) * of_posterior
        prior = cast(Prior, self.state.model)
        with autocast(self.config.train.precision, self.here.device):
            loss = self.model(latents, noise, uniform, labels if prior.num_classes else None)
        return (loss, torch.zeros_like(loss)), loss


class PriorTraining(Loop):
    """One attempt at the training of a prior, in a directory of its own below the run's."""

    remedies = "lower prior.lr or use train.precision=fp32"
    train_set: LatentSet
    test_set: LatentSet

    def __init__(
        self,
        config: Config,
        run: RunDir,
        here: World,
        prior: Prior,
        vae: VAE,
        sets: tuple[LatentSet, LatentSet],
        request: Request,
        file_of: RunDir,
    ) -> None:
        self.prior, self.vae, self.sets, self.request = prior, vae, sets, request
        self.path = file_of.prior(config.prior.name)
        super().__init__(config, run, here)

    def open_sets(self) -> tuple[LatentSet, LatentSet]:
        """See Loop.open_sets."""
        return self.sets

    def build_network(self) -> Prior:
        """See Loop.build_network."""
        return self.prior

    def make_step(self, model: nn.Module) -> PriorStep:
        """See Loop.make_step."""
        return PriorStep(self.config, self.state, model, self.here)

    def batch(self, images: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """See Loop.batch."""
        return images, *self.random(start, stop), self.train_set.labels_of(self.stream.rows(start, stop))

    def random(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise of posteriors and prior, (n, *latent_shape), and uniform numbers (n,), at these positions."""
        seed, shape, device = self.config.seed, self.prior.latent_shape, self.here.device
        return (
            normal(seed, "posterior", start, stop, shape, device),
            normal(seed, "prior_noise", start, stop, shape, device),
            uniform(seed, "prior_uniform", start, stop, device),
        )

    def record(self, means: Sequence[Tensor]) -> dict[str, float]:
        """See Loop.record."""
        return {"loss": float(means[0])}

    @torch.inference_mode()
    def test(self) -> tuple[float, dict[str, float]]:
        """See Loop.test: of one latent an image, with noise that depends on (seed, image) alone."""
        prior = cast(Prior, self.state.averaged_model).eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.here.device)
        first, last = self.here.slice(0, len(self.test_set))
        for start in range(first, last, TEST_BATCH):
            stop = min(start + TEST_BATCH, last)
            of_posterior, noise, uniform = self.random(start, stop)
            mean, logvar = self.test_set.images(range(start, stop)).unbind(1)
            latents = mean + torch.exp(0.5 * logvar) * of_posterior
            labels = self.test_set.labels_of(range(start, stop)) if prior.num_classes else None
            with autocast(self.config.train.precision, self.here.device):
                losses = prior.loss(latents, noise, uniform, labels)
            sums += torch.stack([losses.double().sum(), sums.new_tensor(stop - start)])
        total, count = self.here.sum_(sums).cpu()
        assert int(count) == len(self.test_set), "a test image was missed or counted twice"
        return float(total / count), {"loss": float(total / count)}

    def draw_pictures(self, epoch: int) -> Callable[[], None]:
        """See Loop.draw_pictures: samples."""
        prior = cast(Prior, self.state.averaged_model).eval()
        images = Sampler(self.vae, prior, self.config.seed, 1.0, None, {}).draw(0, 64, self.here.device)
        return lambda: save_grid(self.run.grid("samples", epoch), images, 8)

    def export(self) -> str:
        """See Loop.export."""
        prior = cast(Prior, self.state.averaged_model)
        save_prior(self.path, prior, self.request, num_images=len(self.train_set), step=self.state.step)
        return f"fitted prior: {self.path}"

    def flops_per_image(self) -> int:
        """See Loop.flops_per_image; computed in earnest, since autocast knows no device without values."""
        prior, latents = copy.deepcopy(self.prior).cpu(), torch.zeros(2, *self.prior.latent_shape)
        labels = torch.zeros(2, dtype=torch.int64) if prior.num_classes else None
        with FlopCounterMode(display=False) as counter:
            prior.loss(latents, latents, torch.full((2,), 0.5), labels).sum().backward()
        return int(counter.get_total_flops()) // 2


def training_config(config: Config, folder: RunDir) -> Config:
    """That of a prior's training: the options of `prior`, and for the rest those of the run."""
    options = config.prior
    optimizer = OptimizerConfig(name="adamw", lr=options.lr, warmup_steps=options.warmup_steps, schedule="cosine")
    of_training = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "accumulate": 1,
        "ema_decay": options.ema_decay,
        "grid_every": max(1, options.epochs // NUM_PICTURES),
    }
    return config.model_copy(
        update={
            "run_dir": str(folder.path),
            "objective": ObjectiveConfig(),
            "optimizer": optimizer,
            "train": config.train.model_copy(update=of_training),
            "checkpoint": config.checkpoint.model_copy(update={"best": False}),
        }
    )
