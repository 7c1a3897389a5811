"""A tiny training curve, pinned: what changes these numbers changes every user's results."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.training.run_log import read_records
from tests.helpers import cxr_vae

GOLDEN = Path(__file__).parent / "golden" / "curve.json"

OPTIONS = [
    *("image_size=32", "model.channels=[8, 16]", "latent_dim=4", "batch_size=8", "epochs=3", "log_every=1"),
    *("precision=fp32", "device=cpu", "kl_warmup_steps=6", "warmup_steps=3", "schedule=cosine", "grid_every=9"),
]


def draw(folder: Path) -> None:
    """Images from a formula, stored without loss: no random generator and no JPEG version plays a part."""
    y, x = np.mgrid[0:32, 0:32] / 31
    for split, count in (("train", 20), ("test", 6)):
        for number in range(count):
            picture = 0.5 + 0.3 * np.sin(6 * x + number) * np.cos(4 * y - number) + 0.2 * x * y
            path = folder / split / ("NORMAL", "PNEUMONIA")[number % 2] / f"{split}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 255).clip(0, 255).astype(np.uint8)).save(path)


def curve(folder: Path) -> list[list[float]]:
    """Of each step: number, reconstruction, KL, bits/dim, learning rate, KL weight. Of each epoch: number, test."""
    draw(folder / "source")
    write_shards(folder / "source", folder / "shards", Preprocessing(32), workers=1)
    options = [*OPTIONS, f"data.shards={folder / 'shards'}", f"run_dir={folder / 'run'}"]
    result = cxr_vae("train", "configs/reference.yaml", *options)
    assert result.returncode == 0, result.stderr
    names = ("reconstruction_nats", "kl_nats", "bits_per_dim")
    rows = []
    for record in read_records(folder / "run" / "metrics.jsonl"):
        if record["kind"] == "step":
            rows.append([record["step"], *(record[name] for name in names), record["lr"], record["kl_weight"]])
        else:
            rows.append([record["epoch"], *(record["test"][name] for name in names)])
    return rows


def test_the_curve_is_the_pinned_one(tmp_path: Path) -> None:
    found, golden = curve(tmp_path), json.loads(GOLDEN.read_text())
    assert len(found) == len(golden) == 8 + 3
    for row, expected in zip(found, golden, strict=True):
        # The tolerance allows for another CPU's rounding, which eight steps amplify, not for another algorithm. The KL
        # of the test images, 0.02 of 709 nats, is the small difference of large numbers: right to a millionth of those.
        is_epoch = len(row) == 4
        assert row[:4] == pytest.approx(expected[:4], rel=2e-4, abs=1e-6 * expected[1] if is_epoch else 0)
        assert row[4:] == pytest.approx(expected[4:], rel=1e-12)
