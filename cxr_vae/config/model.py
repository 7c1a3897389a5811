"""`model`: the network, and which options each architecture has."""

import copy
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cxr_vae.config.section import Section

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
    channels: list[PositiveInt] = Field(
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
        if not isinstance(name, str) or name not in ARCHITECTURES:
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
        if self.name == "residual" and len(self.channels) < 2:
            raise ValueError("model.channels should hold two widths or more with model.name=residual")
        if self.name == "residual" and self.norm == "batch":
            raise ValueError("model.norm=batch should be group with model.name=residual, which has no other")
        return self

    @property
    def num_halvings(self) -> int:
        """How often the encoder halves the side."""
        return len(self.channels) - (self.name == "residual")
