"""`objective` and `optimizer`: what is minimised, and how."""

from typing import Literal

from pydantic import Field, model_validator

from cxr_vae.config.section import Section


class ObjectiveConfig(Section):
    """What is minimised: the negative ELBO, in nats an image, and terms beside it."""

    likelihood: Literal["bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic"] = Field(
        "bernoulli", description="of the pixels; the last two learn their scale"
    )
    kl_weight: float = Field(1.0, ge=0, description="factor of the KL term (β)")
    kl_warmup_steps: int = Field(0, ge=0, description="steps over which the KL weight grows linearly from 0; 0: none")
    kl_cycle_steps: int = Field(
        0, ge=0, description="steps of a cycle in whose first half the KL weight grows from 0, over and over; 0: none"
    )
    free_bits: float = Field(
        0.0, ge=0, description="KL in nats that costs nothing, of each latent unit (a mean over a channel's units)"
    )
    laplacian_weight: float = Field(0.0, ge=0, description="factor of a Laplacian-pyramid L1 distance; 0: not computed")
    ms_ssim_weight: float = Field(0.0, ge=0, description="factor of 1 - MS-SSIM, times pixels; 0: not computed")
    adversarial_weight: float = Field(
        0.0, ge=0, description="factor of the adversarial loss, beside its adaptive weight; 0: no discriminator"
    )
    feature_matching_weight: float = Field(
        0.0, ge=0, description="of the discriminator's features, within the adversarial loss; 0: not compared"
    )
    adversarial_start_step: int = Field(0, ge=0, description="finished steps from which the adversarial loss counts")
    adversarial_channels: int = Field(32, ge=1, description="width of the discriminator's first layer")

    @model_validator(mode="after")
    def _one_schedule(self) -> "ObjectiveConfig":
        if self.kl_warmup_steps and self.kl_cycle_steps:
            raise ValueError(
                f"objective.kl_warmup_steps={self.kl_warmup_steps} should be 0 with "
                f"objective.kl_cycle_steps={self.kl_cycle_steps}: each cycle is a warm-up"
            )
        return self


class OptimizerConfig(Section):
    """Gradient descent."""

    name: Literal["adam", "adamw"] = Field("adam", description="torch.optim class")
    lr: float = Field(1e-3, gt=0, description="learning rate (its peak, with a warm-up or a schedule)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled with adamw, an L2 penalty with adam")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate grows linearly; 0: none")
    schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: decays to 0 at the last step")
