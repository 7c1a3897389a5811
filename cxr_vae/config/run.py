"""All sections together: one run."""

from typing import Any, Literal

from pydantic import Field, model_validator

from cxr_vae.config.data import DataConfig
from cxr_vae.config.evaluation import EvaluateConfig
from cxr_vae.config.model import ModelConfig
from cxr_vae.config.objective import ObjectiveConfig, OptimizerConfig
from cxr_vae.config.prior import PriorConfig
from cxr_vae.config.section import MAY_CHANGE, PathText, Section
from cxr_vae.config.training import CheckpointConfig, TrainConfig
from cxr_vae.errors import UserError


class ResourcesConfig(Section):
    """What a job asks for. Read by cxr-launch only."""

    nodes: int = Field(1, ge=1, description="machines")
    processes_per_node: int | None = Field(None, ge=1, description="ranks a machine; null: one a GPU, else one")
    gpus_per_node: int | None = Field(
        None, ge=0, description="GPUs a machine; null: all of it, in Slurm all of the profile"
    )
    cpus_per_process: int | None = Field(
        None, ge=1, description="cores a rank, in Slurm; null: its share of the profile's"
    )
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
