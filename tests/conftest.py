"""Small real data that many tests share: X-ray-like JPEGs in Kaggle's layout, and shards of them."""

from pathlib import Path

import pytest

from cxr_vae.shards import write_shards
from cxr_vae.tars import Preprocessing
from tests.helpers import draw_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 train and 18 test images, of several sizes."""
    root = tmp_path_factory.mktemp("source")
    draw_source(root, {"train": (28, 42), "test": (8, 10)})
    return root


@pytest.fixture(scope="session")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` at 32 px."""
    out = tmp_path_factory.mktemp("sharded") / "shards"
    write_shards(source, out, Preprocessing(image_size=32), workers=2)
    return out
