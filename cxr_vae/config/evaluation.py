"""`evaluate`: generated images against real ones."""

from pydantic import Field

from cxr_vae.config.section import PathText, Section


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
    temperature: float = Field(1.0, gt=0, description="standard deviation of the noise that images are drawn from")
    importance_samples: int = Field(16, ge=1, description="latents an image of the importance-weighted bound")
    is_splits: int = Field(10, ge=1, description="parts the Inception Score is averaged over")
    kid_subset_size: int = Field(1000, ge=2, description="images a KID subset (all, where there are fewer)")
