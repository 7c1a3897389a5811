"""Every option of a run: its default, its meaning, its limits. `config_file` reads and writes them."""

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
        0.01,
        ge=0,
        le=1,
        description="share of unreadable images the shard stage tolerates",
        json_schema_extra=MAY_CHANGE,
    )
    loading: Literal["auto", "memory", "shards"] = Field(
        "auto",
        description="memory: decode once and keep; shards: read on demand; auto: memory when it fits",
        json_schema_extra=MAY_CHANGE,
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="processes that shard, threads a rank that read; null: the cores there are",
        json_schema_extra=MAY_CHANGE,
    )
    train_split: str = Field("train", min_length=1, description="split to train on")
    test_split: str = Field("test", min_length=1, description="split for the test loss")


class ModelConfig(Section):
    """The network."""

    name: Literal["conv"] = Field("conv", description="architecture")
    latent_dim: int = Field(128, ge=1, description="dimensions of the latent vector")
    channels: list[int] = Field(
        [32, 64, 128, 256, 512], min_length=1, description="width of each stride-2 stage of the encoder"
    )
    norm: Literal["batch", "group"] = Field(
        "batch", description="group: the same result for any number of processes, but for rounding"
    )

    @model_validator(mode="after")
    def _positive_channels(self) -> "ModelConfig":
        if min(self.channels) < 1:
            raise ValueError("model.channels should hold positive integers")
        return self


class ObjectiveConfig(Section):
    """The negative ELBO, in nats an image."""

    kl_weight: float = Field(1.0, ge=0, description="factor of the KL term (β)")
    kl_warmup_steps: int = Field(0, ge=0, description="steps over which the KL weight grows linearly from 0; 0: none")


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
    resources: ResourcesConfig = _free_section(ResourcesConfig)

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        multiple = 2 ** len(self.model.channels)
        if self.data.image_size % multiple:
            near = max(multiple, round(self.data.image_size / multiple) * multiple)
            raise ValueError(
                f"data.image_size={self.data.image_size} should be divisible by {multiple}, since model.channels has "
                f"{len(self.model.channels)} stride-2 stages; the nearest is {near}"
            )
        if self.train.batch_size < self.train.accumulate:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} should be at least train.accumulate={self.train.accumulate}"
            )
        if self.device == "cpu" and self.train.precision == "fp16":
            raise ValueError("train.precision=fp16 should be bf16 or fp32 with device=cpu; fp16 needs a GPU")
        return self


def check_batch(config: Config, num_ranks: int) -> None:
    """Raises UserError where a batch can't be divided among the ranks and their micro-batches."""
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if batch_size < num_ranks * accumulate:
        raise UserError(
            f"train.batch_size={batch_size} is less than one image for each of {num_ranks} processes x "
            f"{accumulate} micro-batches; raise it or start fewer processes"
        )
    pixels = (config.data.image_size >> len(config.model.channels)) ** 2
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
