import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from cxr_vae.config_file import load_config
from cxr_vae.precision import peak_flops
from cxr_vae.training.efficiency import flops_per_image
from cxr_vae.training.run_log import read_records
from cxr_vae.training.stopwatch import KINDS, Stopwatch
from tests.helpers import check_sentence, cxr_vae
from tests.test_train import arguments, assert_same_result


def test_operations_are_counted_as_by_hand() -> None:
    """Every layer's multiplications and additions, forward once and backward twice but for the images' gradient."""
    config = load_config(None, ["image_size=32", "model.channels=[8, 16]", "latent_dim=4"])
    down = [2 * 16 * 16 * 8 * 1 * 16, 2 * 8 * 8 * 16 * 8 * 16]
    linear = 3 * 2 * 16 * 8 * 8 * 4
    up = [2 * 8 * 8 * 16 * 8 * 16, 2 * 16 * 16 * 8 * 1 * 16]
    assert flops_per_image(config) == 3 * (sum(down) + linear + sum(up)) - down[0]
    options = [
        "image_size=32",
        "model.channels=[8, 16]",
        "latent_dim=4",
        "adversarial_weight=1",
        "adversarial_channels=1",
    ]
    judge = [2 * 16 * side**2 * a * b for side, a, b in ((16, 1, 1), (8, 1, 2), (4, 2, 4), (3, 4, 8), (2, 8, 1))]
    # There and back to the reconstruction; its own step, there and twice back, on two images without a gradient.
    with_judge = flops_per_image(config) + 2 * sum(judge) + 6 * sum(judge) - 2 * judge[0]
    assert flops_per_image(load_config(None, options)) == with_judge
    assert flops_per_image(load_config(None, [*options, "feature_matching_weight=1"])) == with_judge + sum(judge)
    assert flops_per_image(load_config(None, ["image_size=224"])) == pytest.approx(5.055e9, rel=1e-3)


def test_the_ceiling_is_a_rate() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32", 512) < 1e14


def test_the_watch_counts_each_moment_once() -> None:
    watch = Stopwatch()
    with watch("step"):
        pass
    assert list(watch.waiting(iter([1, 2]))) == [1, 2]
    assert set(watch.seconds) == set(KINDS)
    assert watch.seconds["step"] > 0
    assert watch.seconds["data"] > 0
    with pytest.raises(ZeroDivisionError), watch("log"):
        raise ZeroDivisionError
    assert watch.seconds["log"] > 0


def test_a_run_tells_what_its_time_went_into_and_shows_some_steps(shards: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    result = cxr_vae(*arguments(shards, tmp_path, "epochs=3", "profile=true"))
    took = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "efficiency.json").read_text())
    speeds = read_records(tmp_path / "speed.jsonl")
    # All of the time is accounted for, once; but before the first step, when the profiler is started.
    spent = sum(record[f"{kind}_s"] for record in speeds for kind in KINDS)
    begun, end = (speeds[place]["elapsed_s"] for place in (0, -1))
    assert 0.9 * (end - begun) <= spent <= 1.05 * end
    assert spent <= sum(figures["seconds"].values()) <= took
    assert figures["num_images"] == 3 * 70
    assert 0 < figures["model_flops_utilisation"] < 1
    assert 1e8 < figures["peak_memory_bytes"] < 1e10
    line = next(line for line in result.stdout.splitlines() if "images/s; time: " in line)
    assert "% step" in line
    assert "GFLOP/s; peak memory " in line
    assert line == figures["in_a_line"]
    assert cxr_vae("report", tmp_path).returncode == 0
    assert line in (tmp_path / "report.html").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    named = [event.get("name") for event in trace["traceEvents"]]
    assert named.count("aten::convolution_backward") == 3 * 4  # layers of three steps


def test_compiled_steps_learn_the_same_and_resume_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    options = ("precision=fp32", "grid_every=9")
    # In processes of their own: torch must not have settled for a folder of its own before.
    where = {"CXR_VAE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    for run, epochs in (("straight", 2), ("resumed", 1), ("resumed", 2)):
        more = ("compile=default", f"epochs={epochs}")
        result = cxr_vae(*arguments(shards, tmp_path / run, *options, *more), **where)
        assert result.returncode == 0, result.stderr
    assert any((tmp_path / "cache" / "inductor").iterdir())
    assert_same_result(tmp_path / "straight", tmp_path / "resumed")
    assert cxr_vae(*arguments(shards, tmp_path / "plain", *options, "epochs=2")).returncode == 0
    compiled, plain = (
        [record["loss_nats"] for record in read_records(tmp_path / run / "metrics.jsonl") if record["kind"] == "step"]
        for run in ("straight", "plain")
    )
    assert len(plain) == 10
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_compiling_needs_a_compiler(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = cxr_vae(*arguments(shards, tmp_path / "run", "compile=max"), PATH=str(tmp_path / "empty"))
    check_sentence(result, "train.compile=max needs a C++ compiler and there is no g++: install one, or use off")
    assert not (tmp_path / "run" / "config.yaml").exists()
