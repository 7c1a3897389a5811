import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cxr_vae.checkpoints.manifest import published
from cxr_vae.config_file import load_config
from cxr_vae.data.index import ShardDirectory
from cxr_vae.errors import UserError
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import STOPPED_EXIT_CODE
from cxr_vae.training.run_log import read_records
from cxr_vae.weights import WORDS, facts_in, load_vae, save_weights
from tests.helpers import (
    HANG_S,
    TINY,
    check_sentence,
    command,
    cxr_vae,
    environment,
    held_after,
    processes_with,
    wait_until,
)


def arguments(shards: Path, run_dir: Path, *options: str) -> list[str]:
    return ["train", "configs/reference.yaml", *TINY, f"data.shards={shards}", f"run_dir={run_dir}", *options]


LONG = (
    "precision=bf16",
    "epochs=8",
    "checkpoint.every_steps=7",
    "grid_every=4",
    "ema_decay=0.9",
    "schedule=cosine",
    "kl_warmup_steps=20",
)
"""40 steps: epochs, checkpoints and stops fall on different steps."""


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = cxr_vae(*arguments(shards, run, *LONG))
    assert result.returncode == 0, result.stderr
    return run


def assert_same_result(a: Path, b: Path) -> None:
    one, two = load_file(a / "vae_final.safetensors"), load_file(b / "vae_final.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def test_a_run_leaves_what_its_directory_promises(undisturbed: Path) -> None:
    expected = {
        *("config.yaml", "environment.json", "hyperparameters.json", "metrics.jsonl", "speed.jsonl", "tensorboard"),
        *("checkpoints", "samples", "reconstructions", "loss_curves.png", "vae_final.safetensors", ".lock"),
        *("heartbeat.json", "efficiency.json"),
    }
    assert {path.name for path in undisturbed.iterdir()} == expected
    assert [path.name for path in sorted((undisturbed / "samples").iterdir())] == ["epoch_0004.png", "epoch_0008.png"]
    with Image.open(undisturbed / "reconstructions" / "epoch_0008.png") as grid:
        assert grid.size == (8 * 34 + 2, 4 * 34 + 2)  # 16 of 18 test images in whole rows, each above its copy
    hyperparameters = json.loads((undisturbed / "hyperparameters.json").read_text())
    assert hyperparameters["batch_size"] == 14
    assert hyperparameters["num_train_images"] == 70
    records = read_records(undisturbed / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 41))
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == list(range(1, 9))
    assert published(undisturbed / "checkpoints")[0].name == "step-0000000040"


def test_losses_of_an_epoch_are_the_means_of_its_steps(undisturbed: Path) -> None:
    records = read_records(undisturbed / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    for epoch in (record for record in records if record["kind"] == "epoch"):
        mine = [step for step in steps if epoch["step"] - 5 < step["step"] <= epoch["step"]]
        mean = sum(step["reconstruction_nats"] for step in mine) / 5
        assert epoch["train"]["reconstruction_nats"] == pytest.approx(mean, rel=1e-12)
    for step in steps:
        expected = step["reconstruction_nats"] + step["kl_weight"] * step["kl_nats"]
        assert step["loss_nats"] == pytest.approx(expected, rel=1e-12)
        elbo = step["reconstruction_nats"] + step["kl_nats"]
        assert step["bits_per_dim"] == pytest.approx(elbo / (32 * 32 * math.log(2)), rel=1e-12)
    assert [step["kl_weight"] for step in steps[:20]] == pytest.approx([n / 20 for n in range(1, 21)])


def test_told_to_leave_by_any_signal_it_saves_and_the_end_is_the_same(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    held, _ = held_after(4, tmp_path)
    call = command("cxr-vae", *arguments(shards, run, *LONG))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        done = len(read_records(run / "metrics.jsonl"))
        process = subprocess.Popen(call, env=held, stdout=subprocess.PIPE, text=True)
        while len(read_records(run / "metrics.jsonl")) < done + 2:
            assert process.poll() is None, "it ended before it could be told to stop"
            time.sleep(0.01)
        process.send_signal(number)
        out, _ = process.communicate(timeout=HANG_S)
        assert process.returncode == STOPPED_EXIT_CODE == 75
        assert f"({number.name}); the same command goes on from there" in out
        stopped_at = read_records(run / "metrics.jsonl")[-1]["step"]
        assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{stopped_at:010d}"
    assert cxr_vae(*arguments(shards, run, *LONG, "loading=shards")).returncode == 0  # which may change on the way
    assert_same_result(run, undisturbed)


def test_four_ranks_resume_bit_for_bit_and_a_finished_run_may_be_made_longer(shards: Path, tmp_path: Path) -> None:
    """With three or more the order of summation counts; in fp32 it can't hide."""
    options = ("precision=fp32", "grid_every=100", "model.channels=[32, 64]")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for run, epochs in ((straight, 4), (resumed, 2), (resumed, 4)):
        told = arguments(shards, run, *options, f"epochs={epochs}")
        result = cxr_vae(*told, ranks=4, torchrun=run == straight)  # who starts them makes no difference
        assert result.returncode == 0, result.stderr
        if run == straight:  # warm ones had torch before they could ask it for silence
            assert "Warning" not in result.stderr
    assert "going on from step-0000000010" in result.stdout
    assert result.stdout.count("epoch 4/4") == 1  # printed by the first rank only
    earlier, _ = load_vae(resumed / "vae_step-0000000010.safetensors")  # not taken for those of 4 epochs
    assert earlier.latent_shape == (4,)
    assert_same_result(straight, resumed)


def test_ranks_whose_torchrun_was_killed_save_and_leave(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = command("cxr-vae", *arguments(shards, run, "epochs=1000", "checkpoint.every_steps=100000"), ranks=2)
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(call, env=environment(), stdout=log, stderr=log)
    while len(read_records(run / "metrics.jsonl")) < 5:
        assert torchrun.poll() is None
        time.sleep(0.05)
    torchrun.kill()
    torchrun.wait()
    wait_until(lambda: "stopped after step" in (tmp_path / "log").read_text())
    assert "(the end of torchrun)" in (tmp_path / "log").read_text()
    assert published(run / "checkpoints")[0].name == f"step-{read_records(run / 'metrics.jsonl')[-1]['step']:010d}"
    wait_until(lambda: processes_with(f"run_dir={run}") == [])


def test_a_finished_run_is_left_as_it_is(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    result = cxr_vae(*arguments(shards, run, *LONG, "num_generated=7", "features_weights=/my/own.pth"))
    assert result.returncode == 0, result.stderr
    assert_same_result(run, undisturbed)
    # Priors and figures belong to this file: an option that may change later doesn't make another of it.
    name = "vae_final.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert RunDir(run).saved_config().evaluate.num_generated == 7


def test_weights_of_another_version_are_not_called_damaged(undisturbed: Path, tmp_path: Path) -> None:
    facts = facts_in(undisturbed / "vae_final.safetensors", **WORDS)
    facts["config"]["model"]["width_of_the_future"] = 3
    save_weights(tmp_path / "w.safetensors", torch.nn.Linear(1, 1), facts)
    told = r"w\.safetensors is of another version of cxr_vae, which took model\.width_of_the_future otherwise"
    with pytest.raises(UserError, match=told):
        load_vae(tmp_path / "w.safetensors")
    save_weights(tmp_path / "w.safetensors", torch.nn.Linear(1, 1), {"prior": {}})
    with pytest.raises(UserError, match="is not a file of trained weights, or damaged"):
        load_vae(tmp_path / "w.safetensors")


def test_exported_weights_load_with_their_configuration(undisturbed: Path) -> None:
    model, config = load_vae(undisturbed / "vae_final.safetensors")
    assert config.model == load_config(None, TINY).model
    assert not model.training
    assert model.decode(torch.zeros(1, *model.latent_shape)).shape == (1, 1, 32, 32)
    assert str(undisturbed).encode() not in (undisturbed / "vae_final.safetensors").read_bytes()  # no paths of ours


class TestMistakes:
    """Each is one sentence and exit code 2, and nothing is written."""

    def test_a_typo(self, shards: Path, tmp_path: Path) -> None:
        result = cxr_vae(*arguments(shards, tmp_path / "run", "train.epoch=3"))
        check_sentence(result, "train.epoch", "did you mean train.epochs?")

    def test_another_configuration(self, shards: Path, undisturbed: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
        result = cxr_vae(*arguments(shards, undisturbed, *LONG, "latent_dim=5"))
        check_sentence(result, "model.latent_dim: 4 → 5", "another run_dir")
        assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before

    def test_a_run_directory_that_holds_something_else(self, shards: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        check_sentence(cxr_vae(*arguments(shards, tmp_path)), "holds something else (thesis.tex)")
        check_sentence(cxr_vae(*arguments(shards, tmp_path / "thesis.tex")), "is a file")
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_missing_shards(self, tmp_path: Path) -> None:
        result = cxr_vae(*arguments(tmp_path / "none", tmp_path / "run"))
        check_sentence(result, "no such shard directory", "cxr-vae shard")
        assert not (tmp_path / "run").exists()

    def test_shards_of_another_size(self, shards: Path, tmp_path: Path) -> None:
        result = cxr_vae(*arguments(shards, tmp_path / "run", "image_size=64"))
        check_sentence(result, "was made with image_size=32, but data.image_size is 64")
        assert not (tmp_path / "run").exists()

    def test_a_damaged_shard(self, shards: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shards, tmp_path / "copy")
        os.truncate(copy / "train-000000.tar", 1000)
        check_sentence(cxr_vae(*arguments(copy, tmp_path / "run")), "train-000000.tar has 1000 bytes")

    def test_what_only_another_rank_meets(self, shards: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shards, tmp_path / "copy")
        index = ShardDirectory.open(copy).split("test")
        tar = index.shards[index.numbers("shard")[-1]]  # the second of two ranks tests the last image
        content = bytearray(tar.read_bytes())
        content[index.numbers("offset")[-1] + 50] ^= 1
        tar.write_bytes(content)
        result = cxr_vae(*arguments(copy, tmp_path / "run", "loading=shards", "epochs=1"), ranks=2, torchrun=True)
        assert result.returncode != 0
        assert re.search(
            rf"rank 1 on \S+: cxr-vae: error: {tar} is damaged at byte \d+ \(wrong CRC-32\)", result.stderr
        )

    def test_fp16_without_a_gpu(self, shards: Path, tmp_path: Path) -> None:
        options = [option for option in arguments(shards, tmp_path / "run", "precision=fp16") if option != "device=cpu"]
        check_sentence(cxr_vae(*options, "device=auto", CUDA_VISIBLE_DEVICES=""), "fp16 needs a GPU")

    def test_a_gpu_that_is_not_there(self, shards: Path, tmp_path: Path) -> None:
        result = cxr_vae(*arguments(shards, tmp_path / "run"), "device=cuda", CUDA_VISIBLE_DEVICES="")
        check_sentence(result, "no GPU here")

    def test_damaged_weights_of_a_run_that_is_made_longer(self, shards: Path, trained: Path, tmp_path: Path) -> None:
        run = shutil.copytree(trained, tmp_path / "run")
        os.truncate(run / "vae_final.safetensors", 500)
        result = cxr_vae(*arguments(shards, run, "epochs=3"))
        check_sentence(result, "vae_final.safetensors is not a file of trained weights", "delete it")

    def test_fewer_epochs_than_are_done(self, shards: Path, undisturbed: Path, trained: Path, tmp_path: Path) -> None:
        run = shutil.copytree(undisturbed, tmp_path / "run")
        options = [option for option in LONG if option != "schedule=cosine"]
        check_sentence(cxr_vae(*arguments(shards, run, *options, "schedule=cosine", "epochs=8", "epochs=4")), "cosine")
        plain = shutil.copytree(trained, tmp_path / "plain")
        check_sentence(cxr_vae(*arguments(shards, plain, "epochs=1")), "has done 10 steps, more than the 5")

    def test_a_loss_that_explodes(self, shards: Path, tmp_path: Path) -> None:
        result = cxr_vae(*arguments(shards, tmp_path / "run", "lr=1e30", "precision=fp32"))
        check_sentence(result, "the loss is no finite number for train/", "(rank 0)", "lower optimizer.lr")

    def test_no_checkpoint_is_made_of_a_loss_that_is_no_number(self, shards: Path, tmp_path: Path) -> None:
        options = ("lr=1e30", "precision=fp32", "log_every=1000", "checkpoint.every_steps=4")
        check_sentence(cxr_vae(*arguments(shards, tmp_path / "run", *options)), "the loss is no finite number")
        assert published(tmp_path / "run" / "checkpoints") == []


def test_progress_in_a_log_file_is_whole_lines(shards: Path, tmp_path: Path) -> None:
    result = cxr_vae(*arguments(shards, tmp_path / "run", "epochs=1"))
    assert "\r" not in result.stdout + result.stderr
    assert "epoch 1/1: train" in result.stdout
    assert "bits/dim" in result.stdout


def test_progress_on_a_narrow_terminal_fits_its_width(shards: Path, tmp_path: Path) -> None:
    call = " ".join(command("cxr-vae", *[f"'{item}'" for item in arguments(shards, tmp_path / "run", "epochs=2")]))
    result = subprocess.run(
        ["script", "-qec", f"stty cols 60 rows 24; {call}", "/dev/null"],
        env=environment(TERM="xterm"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    bars = [part for part in result.stdout.replace("\n", "\r").split("\r") if part.startswith("train ")]
    assert len(bars) > 1
    assert all(len(bar.rstrip()) <= 60 for bar in bars), bars
    assert re.search(r"140/140 00:00 .*loss \d+\.\d", bars[-1]), bars[-1]


def test_a_full_log_disk_is_no_reason_to_stop(shards: Path, tmp_path: Path) -> None:
    call = command("cxr-vae", "train", "configs/reference.yaml", *TINY, "epochs=1", f"data.shards={shards}")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([*call, f"run_dir={tmp_path / 'run'}"], env=environment(), stdout=full, stderr=full)
    assert result.returncode == 0
    assert (tmp_path / "run" / "vae_final.safetensors").is_file()
