"""The plain program that benchmarks measure against is a fair one: it learns what we learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.baseline import VAE, vae_loss
from cxr_vae.config_file import load_config
from cxr_vae.losses.elbo import negative_elbo
from cxr_vae.models import build_model
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_epochs
from tests.helpers import cxr_vae, environment
from tests.test_train import arguments

SMALL = ("--image-size", "32", "--channels", "8", "16", "--latent-dim", "4", "--batch-size", "14")


def test_it_is_the_reference_model() -> None:
    assert sum(parameter.numel() for parameter in VAE().parameters()) == 15_235_137
    ours = build_model(load_config(None, ["image_size=64"]))
    plain = VAE(64)
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    images, noise = torch.rand(4, 1, 64, 64), torch.randn(4, 128)
    output, (pixels, mean, logvar) = ours(images, noise), plain(images, noise)
    torch.testing.assert_close(output.logits.sigmoid(), pixels)
    expected = negative_elbo(output, images, "bernoulli").total().sum()
    torch.testing.assert_close(vae_loss(pixels, images, mean, logvar), expected)


def test_it_learns_the_same(source: Path, shards: Path, tmp_path: Path) -> None:
    """From other weights and in another order, so the losses agree as those of two seeds do."""
    plain, ours = [], []
    for seed in (0, 1):
        call = [sys.executable, "benchmarks/baseline.py", str(source), str(tmp_path / f"plain{seed}"), *SMALL]
        more = ["--epochs", "8", "--seed", str(seed)]
        told = subprocess.run([*call, *more], env=environment(), capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in told.splitlines()]
        assert records[0]["first_step_s"] > 0
        plain.append([record["test_loss"] for record in records[1:]])
        run = tmp_path / f"ours{seed}"
        result = cxr_vae(*arguments(shards, run, "precision=fp32", "epochs=8", f"seed={seed}", "grid_every=99"))
        assert result.returncode == 0, result.stderr
        ours.append([epoch["test"]["loss_nats"] for epoch in read_epochs(RunDir(run))])
    assert (tmp_path / "plain0" / "vae.pt").is_file()
    for losses in (*plain, *ours):
        assert losses[-1] < losses[0] - 10
    last = [[losses[-1] for losses in of] for of in (plain, ours)]
    spread = max(abs(of[0] - of[1]) for of in last)
    assert abs(sum(last[0]) - sum(last[1])) / 2 < max(2 * spread, 5)
    assert last[0][0] == pytest.approx(last[1][0], rel=0.03)
