"""A training step of a VAE: the objective of its images and, where it is asked for, the adversarial loss."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config import Config
from cxr_vae.data.dataset import to_float
from cxr_vae.distributed import World, gradients_stay_local
from cxr_vae.losses.adversarial import adaptive_weight, feature_matching_loss, generator_loss, hinge_discriminator_loss
from cxr_vae.losses.elbo import Output
from cxr_vae.losses.likelihoods import LIKELIHOODS
from cxr_vae.losses.objective import objective
from cxr_vae.precision import autocast
from cxr_vae.training.compilation import compiled
from cxr_vae.training.step import Step


class VaeStep(Step):
    """Batches are images (b, 1, H, W) uint8, standard normal noise (b, *latent_shape) and classes (b,) int64."""

    def __init__(self, config: Config, state: TrainState, model: nn.Module, here: World) -> None:
        super().__init__(config, state, model, here)
        self._critic: Any = None
        if state.critic is not None:
            self.num_terms = 3
            self._critic = compiled(state.critic.model, config.train.compile)
            self._parallel_critic = here.parallel(self._critic, compress=config.train.compress_gradients)

    @property
    def is_adversarial(self) -> bool:
        """Whether the discriminator plays a part in the next step."""
        return self._critic is not None and self.state.step >= self.config.objective.adversarial_start_step

    @property
    def phase(self) -> str:
        """See Step.phase."""
        return "adversarial" if self.is_adversarial else ""

    def networks(self) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
        """See Step.networks."""
        critic = self.state.critic
        return super().networks() + ([(critic.model, critic.optimizer)] if critic and self.is_adversarial else [])

    def losses(
        self, batch: Sequence[Tensor], kl_weight: Tensor | float, *, last: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """See Step.losses: reconstruction and KL in nats, and with a discriminator its loss."""
        images, noise, labels = batch
        images = to_float(images, self.here.device)
        with autocast(self.config.train.precision, self.here.device):
            output = self.model(images, noise, labels if self.config.model.num_classes else None)
        terms, loss = objective(output, images, self.config.objective, kl_weight)
        if self._critic is None:
            return terms, loss
        if not self.is_adversarial:
            return (*terms, torch.zeros_like(loss)), loss
        deceiving, reconstructions = self.deceive(output, images)
        critic_loss = self.train_critic(images, reconstructions, last=last)
        return (*terms, critic_loss), loss + deceiving

    def deceive(self, output: Output, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the loss of each image, (b,), and the reconstructions (b, 1, H, W), detached.

        Its gradient is that of the adversarial loss with its weights; its value means nothing. So the network is gone
        through backwards once for both losses, whose gradients at the logits, taken first, decide the weights.
        """
        options, (critic, _) = self.config.objective, self.networks()[1]
        likelihood = LIKELIHOODS[options.likelihood]
        logits = output.logits.detach().float().requires_grad_()
        critic.requires_grad_(False)
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = likelihood.nll(logits, images, output.log_scale.detach())
            (pull,) = torch.autograd.grad(reconstruction.sum(), logits)
            reconstructions = likelihood.image(logits)
        with autocast(self.config.train.precision, self.here.device):
            *features, verdict = self._critic(reconstructions)
            loss = generator_loss(verdict)
            if options.feature_matching_weight:
                with torch.no_grad():
                    of_images = self._critic(images)[:-1]
                loss = loss + options.feature_matching_weight * feature_matching_loss(of_images, features)
        (push,) = torch.autograd.grad(loss.sum(), logits)
        critic.requires_grad_(True)
        weight = options.adversarial_weight * adaptive_weight(pull, push)
        return weight * (output.logits.float() * push).flatten(1).sum(1), reconstructions.detach()

    def train_critic(self, images: Tensor, reconstructions: Tensor, *, last: bool) -> Tensor:
        """Gradients of the discriminator; returns its loss of each pair, (b,)."""
        both = torch.cat([images, reconstructions])
        with nullcontext() if last else gradients_stay_local(self._parallel_critic):
            with autocast(self.config.train.precision, self.here.device):
                verdicts = self._parallel_critic(both)[-1]
            loss = hinge_discriminator_loss(*verdicts.chunk(2))
            (loss.sum() * self.share).backward()
        return loss.detach()
