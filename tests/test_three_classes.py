"""Three classes, from the folder to the report."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxr_vae.data.dataset import open_dataset, open_split
from cxr_vae.noise import uniform
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_epochs
from tests.helpers import check_sentence, cxr_vae, draw_source
from tests.test_recipe import FIELD, HERE, PRIOR, train


def test_three_classes_go_all_the_way(tmp_path: Path) -> None:
    """COVID is the first in the alphabet and the rarest: it numbers the others anew."""
    draw_source(tmp_path / "source", {"train": (14, 21, 7), "val": (1, 1, 1), "test": (4, 5, 3)})
    shards, run = tmp_path / "shards", tmp_path / "run"
    sharded = cxr_vae("shard", tmp_path / "source", shards, "--image-size", 32)
    assert "train 42 (COVID 7, NORMAL 14, PNEUMONIA 21)" in sharded.stdout, sharded.stderr
    check_sentence(cxr_vae(*train(shards, run)), "model.num_classes=2", "has 3 classes (COVID, NORMAL, PNEUMONIA)")
    field = (*FIELD, *PRIOR, "prior.epochs=2")
    for call in ((*train(shards, run), "num_classes=3", "epochs=2"), ("prior", run, *field)):
        result = cxr_vae(*call)
        assert result.returncode == 0, result.stderr

    config = RunDir(run).saved_config()
    dataset = open_dataset(config.data, open_split(config.data, "test"), HERE)
    assert dataset.labels(range(12), HERE.device).bincount().tolist() == [3, 4, 5]
    weights = load_file(run / "vae_final.safetensors")
    told = [tensor for name, tensor in weights.items() if name.endswith("film.weight")]
    assert told
    for tensor in told:
        assert len(tensor) == 3
        assert tensor.any(1).all()  # 0 at first: each class has been learned
    shares = load_file(RunDir(run).prior("flow_matching"))["class_shares"]
    torch.testing.assert_close(shares, torch.tensor([7, 14, 21]) / 42)

    drawn: dict[str | None, list[bytes]] = {}
    for label in ("COVID", "NORMAL", "PNEUMONIA", None):
        chosen, out = ("--label", label) if label else (), tmp_path / f"made {label}"
        result = cxr_vae("generate", run, "--prior", "flow_matching", "--num", 24, *chosen, "--out", out)
        assert result.returncode == 0, result.stderr
        drawn[label] = [path.read_bytes() for path in sorted(out.glob("*.png"))]
    at = uniform(config.seed, "label", 0, 64)[:24].tolist()
    labels = ["COVID" if u < 7 / 42 else "NORMAL" if u < 21 / 42 else "PNEUMONIA" for u in at]
    assert set(labels) == {"COVID", "NORMAL", "PNEUMONIA"}
    assert drawn[None] == [drawn[label][number] for number, label in enumerate(labels)]
    assert len({image for label in set(labels) for image in drawn[label]}) == 3 * 24

    options = ("features=tests.test_recipe:thumbnails", "num_generated=20", "num_real=12", "is_splits=2")
    evaluated = cxr_vae("evaluate", run, *options, *FIELD[:1])
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads(RunDir(run).results.read_text())
    assert results["generated"]["prior"] == "flow_matching"
    tested = read_epochs(RunDir(run))[-1]["test"]["reconstruction_nats"]
    assert results["likelihood"]["reconstruction_nats"]["value"] == pytest.approx(tested, rel=1e-5)
    for program, path in (("inspect", shards), ("report", run)):
        result = cxr_vae(program, path)
        assert result.returncode == 0, result.stderr
