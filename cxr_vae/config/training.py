"""`train` and `checkpoint`: a run, and what it goes on from."""

from typing import Literal

from pydantic import Field, model_validator

from cxr_vae.config.section import MAY_CHANGE, Section


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
