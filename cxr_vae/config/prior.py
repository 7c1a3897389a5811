"""`prior`: what new images are drawn from."""

from typing import Literal

from pydantic import Field, PositiveInt

from cxr_vae.config.section import Section


class PriorConfig(Section):
    """What new images are drawn from: a distribution over latents, fitted to the trained network's."""

    name: Literal["standard", "gmm", "flow", "flow_matching"] = Field(
        "standard",
        description="standard: N(0, 1), with the shares of the classes if the decoder is told them; gmm, flow: for "
        "latent vectors; flow_matching: for spatial ones",
    )
    class_conditional: bool = Field(
        True, description="learn each class of the training split, to draw from one of them"
    )
    num_components: int | None = Field(
        None, ge=1, description="normals a class of gmm; null: as many as suit held-out images best"
    )
    num_layers: int = Field(8, ge=1, description="couplings of flow")
    width: int = Field(256, ge=1, description="hidden units of flow's networks")
    channels: list[PositiveInt] = Field(
        [96, 192],
        min_length=1,
        description="width of flow_matching at each resolution; each further one is half the side",
    )
    num_blocks: int = Field(2, ge=1, description="residual blocks of flow_matching at each resolution")
    guide_channels: list[PositiveInt] = Field(
        [], description="as channels, of a small network trained beside, which autoguidance needs; []: none"
    )
    times: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="how often flow_matching trains at which time; logit_normal: the middle more often"
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of images flow_matching trains on without their class, which guidance needs"
    )
    num_steps: int = Field(25, ge=1, description="steps of flow_matching from noise to a latent, two calls each")
    guidance: float = Field(1.0, ge=0, description="of flow_matching towards the class; 1: none, more: more typical")
    autoguidance: float = Field(
        1.0, ge=0, description="of flow_matching away from what the small network draws; 1: none, 1.5 to 2: sharper"
    )
    batch_size: int = Field(256, ge=1, description="latents a step of flow and flow_matching over all ranks together")
    epochs: int = Field(200, ge=1, description="passes over the training split's latents")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW, which decays to 0 as a cosine")
    warmup_steps: int = Field(100, ge=0, description="steps over which the learning rate grows linearly; 0: none")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay a step of the averaged weights that are saved; 0: off"
    )
