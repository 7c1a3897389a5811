"""`data`: where images come from."""

from typing import Literal

from pydantic import Field

from cxr_vae.config.section import MAY_CHANGE, PathText, Section


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
