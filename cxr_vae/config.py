"""Every option of a run: its default, its meaning, its limits. `config_file` reads and writes them."""

import copy
import os.path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from cxr_vae.errors import UserError

MAY_CHANGE: JsonDict = {"may_change": True}
"""Marks what a resumed run may have changed: it does not enter the result, or only as the user then wants."""

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path as text; ~ is the home directory."""


class Section(BaseModel):
    """A group of options: immutable, strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the images come from, and in which form they are kept and read."""

    source: PathText | None = Field(
        None,
        description="folder of X-rays (split/class/*.jpg|jpeg|png), read by the shard stage only",
        json_schema_extra=MAY_CHANGE,
    )
    split_file: PathText | None = Field(
        None,
        description="CSV of `cxr-vae split` that says which image is in which split; null: the source's folders do",
        json_schema_extra=MAY_CHANGE,
    )
    shards: PathText = Field("shards", description="directory of the shards", json_schema_extra=MAY_CHANGE)
    image_size: int = Field(224, ge=8, le=4096, description="height and width in pixels")
    fit: Literal["stretch", "letterbox", "crop"] = Field("stretch", description="how other aspect ratios become square")
    format: Literal["png", "jpg", "raw"] = Field("png", description="how shards store images; png and raw are lossless")
    max_rejected: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images that sharding tolerates", json_schema_extra=MAY_CHANGE
    )
    loading: Literal["auto", "gpu", "memory", "shards"] = Field(
        "auto",
        description="gpu, memory: decode once and keep, in memory once a machine; shards: read at each use; auto: the "
        "first that has room",
        json_schema_extra=MAY_CHANGE,
    )
    shuffle_block: int = Field(
        1,
        ge=1,
        description="neighbouring images read at once, for large sets on a parallel file system: 32, say; shuffled "
        "within 64 such blocks. 1: every order is as likely",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="processes that shard, threads a rank that read; null: the cores there are",
        json_schema_extra=MAY_CHANGE,
    )
    train_split: str = Field("train", min_length=1, description="split to train on")
    test_split: str = Field("test", min_length=1, description="split for the test loss")


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "conv": {"channels": [32, 64, 128, 256, 512], "norm": "batch", "latent_dim": 128},
    "residual": {"channels": [24, 48, 96, 192], "norm": "group", "latent_channels": 4, "num_blocks": 1},
}
"""The options each architecture has, with their defaults. Those that only others have are null."""


class ModelConfig(Section):
    """The network."""

    name: Literal["conv", "residual"] = Field(
        "conv", description="architecture: conv has a latent vector, residual spatial latents"
    )
    channels: list[int] = Field(
        ARCHITECTURES["conv"]["channels"],
        min_length=1,
        description="conv: width of each stride-2 stage of the encoder; residual: width at side, side / 2, side / 4, …",
    )
    norm: Literal["batch", "group"] = Field(
        "batch", description="group: the same result for any number of processes, but for rounding; residual's only one"
    )
    latent_dim: int | None = Field(None, ge=1, description="conv: dimensions of the latent vector")
    latent_channels: int | None = Field(None, ge=1, description="residual: channels of the spatial latents")
    num_blocks: int | None = Field(None, ge=1, description="residual: blocks at each resolution")
    num_classes: int = Field(0, ge=0, description="classes the decoder is told of, as many as folders; 0: none")

    @model_validator(mode="before")
    @classmethod
    def _options_of_the_architecture(cls, options: Any) -> Any:
        """Fills in what isn't given; ValueError for an option that the architecture would not look at."""
        name = options.get("name", "conv") if isinstance(options, dict) else None
        if name not in ARCHITECTURES:
            return options  # for pydantic to refuse
        has = ARCHITECTURES[name]
        others = {option for defaults in ARCHITECTURES.values() for option in defaults} - set(has)
        for option in sorted(others):
            if options.get(option) is not None:
                raise ValueError(
                    f"model.{option}={options[option]} is no option of model.name={name}, which has "
                    f"{', '.join(f'model.{mine}' for mine in has)}; leave it out"
                )
        given = {option: value for option, value in options.items() if value is not None}
        return copy.deepcopy(has) | given

    @model_validator(mode="after")
    def _possible(self) -> "ModelConfig":
        if min(self.channels) < 1:
            raise ValueError("model.channels should hold positive integers")
        if self.name == "residual" and len(self.channels) < 2:
            raise ValueError("model.channels should hold two widths or more with model.name=residual")
        if self.name == "residual" and self.norm == "batch":
            raise ValueError("model.norm=batch should be group with model.name=residual, which has no other")
        return self

    @property
    def num_halvings(self) -> int:
        """How often the encoder halves the side."""
        return len(self.channels) - (self.name == "residual")


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


class TrainConfig(Section):
    """The training run."""

    epochs: int = Field(50, ge=1, description="passes over the training split", json_schema_extra=MAY_CHANGE)
    batch_size: int = Field(32, ge=1, description="images a step over all ranks together (the global batch)")
    accumulate: int = Field(
        1, ge=1, description="micro-batches a rank splits its part of a batch into", json_schema_extra=MAY_CHANGE
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="autocast type; fp16 needs a GPU")
    compile: Literal["off", "default", "max"] = Field(
        "off", description="torch.compile of the network; max also searches for the fastest kernels"
    )
    cuda_graph: bool = Field(
        True,
        description="on a GPU with one process, tell it a whole step at once: the same numbers; not with fp16",
        json_schema_extra=MAY_CHANGE,
    )
    compress_gradients: bool = Field(False, description="ranks exchange gradients in bf16, half the bytes")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay a step of the averaged weights that are then tested and exported; 0: off"
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="steps with a loss or gradient that is no finite number to leave out before the run stops",
        json_schema_extra=MAY_CHANGE,
    )
    max_minutes: float | None = Field(
        None, gt=0, description="save and leave this long after the start; null: no limit", json_schema_extra=MAY_CHANGE
    )
    stall_minutes: float = Field(
        30.0, gt=0, description="how long ranks wait for one that stalls before all stop", json_schema_extra=MAY_CHANGE
    )
    log_every: int = Field(50, ge=1, description="steps between two lines of metrics", json_schema_extra=MAY_CHANGE)
    grid_every: int = Field(
        1, ge=1, description="epochs between two sample and reconstruction grids", json_schema_extra=MAY_CHANGE
    )
    profile: bool = Field(
        False, description="write a torch profiler trace of a few steps", json_schema_extra=MAY_CHANGE
    )
    grid_size: int = Field(
        8, ge=1, le=32, description="images along a side of a sample grid", json_schema_extra=MAY_CHANGE
    )


class CheckpointConfig(Section):
    """What a broken-off run can go on from."""

    every_steps: int | None = Field(None, ge=1, description="save every so many steps; null: not by steps")
    every_minutes: float | None = Field(5.0, gt=0, description="save every so many minutes; null: not by the clock")
    keep: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int | None = Field(None, ge=1, description="also keep those whose step is a multiple of this")
    best: bool = Field(
        True, description="also save at the end of an epoch with the lowest test loss so far, and keep that one"
    )
    on_failure: Literal["stop", "continue"] = Field("stop", description="what to do when a checkpoint can't be written")

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> "CheckpointConfig":
        if self.keep_every is not None and (self.every_steps is None or self.keep_every % self.every_steps):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} should be a multiple of "
                f"checkpoint.every_steps={self.every_steps}: only those steps are saved"
            )
        return self


class EvaluateConfig(Section):
    """Generated images against real ones."""

    num_generated: int = Field(1000, ge=4, description="images to generate")
    num_real: int = Field(1000, ge=4, description="real images to compare with (all, where the split has fewer)")
    real_split: str = Field("test", min_length=1, description="split the real images are taken from")
    floor_split: str = Field("train", min_length=1, description="split whose real images give the floor")
    features: str = Field(
        "inception",
        pattern=r"^(inception|random|auto|[\w.]+:\w+)$",
        description="inception; random: random weights, which give no FID; auto: inception if it can be had, else "
        "random; or a function of yours, package.module:function",
    )
    features_weights: PathText | None = Field(None, description="weights file of a network of yours")
    temperature: float = Field(1.0, gt=0, description="standard deviation of the latents that are generated from")
    importance_samples: int = Field(16, ge=1, description="latents an image of the importance-weighted bound")
    is_splits: int = Field(10, ge=1, description="parts the Inception Score is averaged over")
    kid_subset_size: int = Field(1000, ge=2, description="images a KID subset (all, where there are fewer)")


class PriorConfig(Section):
    """What new images are drawn from: a distribution over latents, fitted to the trained network's."""

    name: Literal["standard", "gmm", "flow", "flow_matching"] = Field(
        "standard",
        description="standard: N(0, 1), nothing to fit; gmm, flow: for latent vectors; flow_matching: for spatial ones",
    )
    class_conditional: bool = Field(
        True, description="learn each class of the training split, to draw from one of them"
    )
    num_components: int | None = Field(
        None, ge=1, description="normals a class of gmm; null: as many as suit held-out images best"
    )
    num_layers: int = Field(8, ge=1, description="couplings of flow")
    width: int = Field(256, ge=1, description="hidden units of flow's networks")
    channels: list[int] = Field(
        [96, 192],
        min_length=1,
        description="width of flow_matching at each resolution; each further one is half the side",
    )
    num_blocks: int = Field(2, ge=1, description="residual blocks of flow_matching at each resolution")
    times: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="how often flow_matching trains at which time; logit_normal: the middle more often"
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of images flow_matching trains on without their class, which guidance needs"
    )
    num_steps: int = Field(25, ge=1, description="steps of flow_matching from noise to a latent, two calls each")
    guidance: float = Field(1.0, ge=0, description="of flow_matching towards the class; 1: none, more: more typical")
    batch_size: int = Field(256, ge=1, description="latents a step of flow and flow_matching over all ranks together")
    epochs: int = Field(200, ge=1, description="passes over the training split's latents")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW, which decays to 0 as a cosine")
    warmup_steps: int = Field(100, ge=0, description="steps over which the learning rate grows linearly; 0: none")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay a step of the averaged weights that are saved; 0: off"
    )

    @model_validator(mode="after")
    def _positive_channels(self) -> "PriorConfig":
        if min(self.channels) < 1:
            raise ValueError("prior.channels should hold positive integers")
        return self


class ResourcesConfig(Section):
    """What a job asks for. Read by cxr-launch only."""

    nodes: int = Field(1, ge=1, description="machines")
    processes_per_node: int | None = Field(None, ge=1, description="ranks a machine; null: one a GPU, else one")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs a machine; null: all it has")
    cpus_per_process: int | None = Field(None, ge=1, description="cores a rank; null: its share of the machine's")
    memory_gb: int | None = Field(None, ge=1, description="memory a machine; null: all the cluster profile gives")
    hours: float | None = Field(
        None, gt=0, description="time limit of a job, after which it queues again; null: the profile's longest, or 24"
    )


def _free_section(kind: type[Section]) -> Any:
    """A section that a resumed run may have changed altogether."""
    return Field(kind(), json_schema_extra=MAY_CHANGE)


class Config(Section):
    """One run, from the folder of X-rays to the figures."""

    run_dir: PathText = Field(
        "runs/reference", min_length=1, description="everything about a run", json_schema_extra=MAY_CHANGE
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the order of the images and all noise")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the GPU, if any", json_schema_extra=MAY_CHANGE
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = _free_section(CheckpointConfig)
    evaluate: EvaluateConfig = _free_section(EvaluateConfig)
    prior: PriorConfig = _free_section(PriorConfig)
    resources: ResourcesConfig = _free_section(ResourcesConfig)

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        multiple = 2**self.model.num_halvings
        if self.data.image_size % multiple:
            near = max(multiple, round(self.data.image_size / multiple) * multiple)
            raise ValueError(
                f"data.image_size={self.data.image_size} should be divisible by {multiple}, since model.channels has "
                f"{self.model.num_halvings} stride-2 stages; the nearest is {near}"
            )
        for option, smallest in (("ms_ssim_weight", 11), ("adversarial_weight", 24)):
            if getattr(self.objective, option) and self.data.image_size < smallest:
                raise ValueError(
                    f"data.image_size={self.data.image_size} should be {smallest} or more with objective.{option}"
                )
        if self.train.batch_size < self.train.accumulate:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} should be at least train.accumulate={self.train.accumulate}"
            )
        if self.objective.adversarial_weight and self.train.precision == "fp16":
            raise ValueError("train.precision=fp16 should be bf16 or fp32 with objective.adversarial_weight")
        if self.device == "cpu" and self.train.precision == "fp16":
            raise ValueError("train.precision=fp16 should be bf16 or fp32 with device=cpu; fp16 needs a GPU")
        return self

    @property
    def needs_fitted_prior(self) -> bool:
        """Whether `cxr-vae prior` has to run before images can be drawn: with classes, their shares are fitted."""
        return self.prior.name != "standard" or self.model.num_classes > 0


def check_batch(config: Config, num_ranks: int) -> None:
    """Raises UserError where a batch can't be divided among the ranks and their micro-batches."""
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if batch_size < num_ranks * accumulate:
        raise UserError(
            f"train.batch_size={batch_size} is less than one image for each of {num_ranks} processes x "
            f"{accumulate} micro-batches; raise it or start fewer processes"
        )
    pixels = (config.data.image_size >> config.model.num_halvings) ** 2
    if config.model.norm == "batch" and batch_size // (num_ranks * accumulate) * pixels < 2:
        raise UserError(
            f"train.batch_size={batch_size} leaves micro-batches of one image, whose smallest feature map is one "
            "pixel, and batch norm needs two values; raise it or start fewer processes"
        )


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
OPTIONS: dict[str, Any] = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS} | {
    f"{section}.{name}": field for section, kind in SECTIONS.items() for name, field in kind.model_fields.items()
}
"""Every dotted key and its pydantic field."""
