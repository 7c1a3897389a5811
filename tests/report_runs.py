"""Run directories as training, evaluation and audit leave them, for the tests of reports."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cxr_vae.config_file import load_config
from cxr_vae.files import write_json
from cxr_vae.pictures import save_grid
from cxr_vae.report.command import report_runs
from cxr_vae.run_dir import RunDir

ROOT = Path(__file__).parents[1]

RESULTS: dict[str, Any] = {
    "figures": {
        "fid": {
            "value": 81.2345,
            "interval_95": [78.1, 84.369],
            "floor": 12.345,
            "floor_interval_95": [11.2, 13.49],
        },
        "kid": {
            "value": 0.03459,
            "interval_95": [0.03318, 0.036],
            "floor": -2.9e-6,
            "floor_interval_95": [-2.35e-5, 1.77e-5],
        },
        "inception_score": {"value": 1.0000688, "interval_95": [1.0000637, 1.0000739], "floor": 1.25},
    },
    "reconstructions": {
        "num": 90,
        "figures": {
            "fid": {"value": 44.4, "interval_95": [44.0, 44.8]},
            "psnr_db": {"value": 24.51, "interval_95": [24.4, 24.62]},
        },
    },
    "likelihood": {
        "bits_per_dim": {"value": 0.8765, "interval_95": [0.8755, 0.8775]},
        "my_own_figure": {"value": 12345},
    },
    "latent": {"active_units": 2, "num_units": 4, "kl_nats_per_unit": [3.5, 1.25, 0.01, 0.001]},
    "num_generated": 100,
    "num_real": 90,
    "num_floor": 100,
    "real": {"split": "test", "index_sha256": "a" * 64},
    "floor": {"split": "train", "index_sha256": "b" * 64, "meaning": "real images of this split"},
    "interval": "value ± 1.96 standard errors",
    "features": {"network": "inception", "weights_sha256": "c" * 64, "dtype": "float32", "resize": "TensorFlow's"},
    "image_size": 32,
    "versions": {"torch": "2.15"},
    "request": {"evaluate": {"is_splits": 10, "kid_subset_size": 90}},
}


def changed(**parts: dict[str, Any] | int) -> dict[str, Any]:
    """RESULTS with other values in some parts."""
    results: dict[str, Any] = json.loads(json.dumps(RESULTS))
    for name, value in parts.items():
        if isinstance(value, dict):
            results[name] |= value
        else:
            results[name] = value
    return results


AUDIT = {
    "tables": [{"title": "Closest pairs", "headers": ["sample", "ratio", "known"], "rows": [["000017", 0.031, True]]}],
    "findings": [{"level": "warning", "text": "5 samples are copies of training images."}],
    "pictures": [{"title": "Samples above their nearest", "file": "closest_pairs.png"}],
    "samples": {"folder": "other/pngs", "num_other_files": 0},
}


def make_run(
    path: Path,
    results: dict[str, Any] | None = None,
    losses: tuple[float, ...] = (700, 600, 650),
    *,
    kl_warmup: int = 1,
) -> RunDir:
    """A run directory as training leaves it, written by what training writes it with; `losses` are negative ELBOs."""
    run = RunDir(path)
    config = load_config(
        ROOT / "configs/reference.yaml",
        ["image_size=32", "model.channels=[8, 16]", "latent_dim=4", f"data.shards={path.parent / 'shards'}"],
    )
    run.claim(config, {"world_size": 2, "device": "cpu"})
    lines = []
    for number, loss in enumerate(losses):
        weighted = loss - 20 + 20 * min(1, (number + 1) / kl_warmup)
        of = {"loss_nats": weighted, "reconstruction_nats": loss - 20, "kl_nats": 20.0, "bits_per_dim": loss / 710}
        lines.append({"kind": "epoch", "step": number + 1, "epoch": number + 1, "train": of, "test": of})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    speeds = [(1, 0.5), (2, 1.0), (3, 0.4)]  # broken off after the second
    run.speed.write_text(
        "".join(json.dumps({"step": step, "elapsed_s": s, "images_per_s": 30.0}) + "\n" for step, s in speeds)
    )
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for kind in ("samples", "reconstructions"):
        save_grid(run.grid(kind, 2), images, 2)
    if results is not None:
        run.evaluation.mkdir()
        write_json(run.results, results)
    return run


def full_run(path: Path) -> RunDir:
    """A run with everything a report can show."""
    run = make_run(path, RESULTS)
    rng = np.random.default_rng(0)
    for folder in ("generated", "real"):
        (run.evaluation / folder).mkdir()
        for number in range(3):
            image = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
            image.save(run.evaluation / folder / f"{number:06d}.png")
    (run.evaluation / "pictures").mkdir()
    shutil.copy(run.grid("samples", 2), run.evaluation / "pictures" / "latent_traversals.png")
    shutil.copy(run.grid("samples", 2), run.evaluation / "closest_pairs.png")
    write_json(run.evaluation / "memorisation.json", AUDIT)
    shards = path.parent / "shards"
    shards.mkdir(exist_ok=True)
    write_json(shards / "manifest.json", {"splits": {"test": {"index": {"sha256": "a" * 64}}}})
    write_json(
        shards / "inspection.json",
        {
            "index_hashes": {"test": "a" * 64},
            "tables": [{"title": "Images", "headers": ["split", "images"], "rows": [["test", 5216], ["val", None]]}],
            "findings": [{"level": "ok", "text": "No patient is in two splits."}],
        },
    )
    return run


def as_number(text: str) -> float:
    return float(text.partition("|")[0].replace("−", "-").replace(" ", ""))


def reported_run(folder: Path) -> RunDir:
    """A full run whose report is written."""
    run = full_run(folder / "run")
    text, page = report_runs([run.path])
    assert page == run.path / "report.html"
    assert "Losses, nats an image" in text
    return run
