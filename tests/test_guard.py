"""What must not reach the weights or hang a job: numbers that are none, ranks that die or stall."""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cxr_vae.checkpoints.manifest import published
from cxr_vae.training.guard import describe_nonfinite, gradient_norm
from cxr_vae.training.run_log import read_records
from tests.helpers import HANG_S, command, environment, processes_with, wait_until, with_patch
from tests.ranks import on_ranks
from tests.test_train import arguments


def test_the_norm_of_all_gradients() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert gradient_norm(parameters).item() == 13
    parameters[1].grad = torch.tensor([torch.nan])
    assert gradient_norm(parameters).isnan()


def test_sentences() -> None:
    assert describe_nonfinite(7, [[], ["a.png", "b.png"]]) == (
        "step 7: the loss is no finite number for a.png (rank 1), b.png (rank 1)"
    )
    assert describe_nonfinite(7, [list("abcdefg")]).endswith("d (rank 0) and 3 more")
    assert "the gradient is no finite number, though the loss of every image is" in describe_nonfinite(7, [[], []])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_with_a_loss_that_is_no_number_is_left_out(shards: Path, tmp_path: Path, ranks: int) -> None:
    """The third step's images come to nan on the last rank: skipped, the rest goes on as if that step had not been."""
    seen = on_ranks("poisoned", ranks, tmp_path, shards, tmp_path / "run", "skip_nonfinite=1", "epochs=1", "norm=batch")
    for rank in seen:
        assert rank["error"] == ""
        assert rank["skipped"] == 1
        assert rank["unchanged_by_skip"] is True
        assert rank["step"] == 5
    (record,) = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "skipped"]
    assert record["step"] == 3
    assert [len(names) for names in record["images_by_rank"]] == [0] * (ranks - 1) + [14 // ranks]
    steps = [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2, 4, 5]


def test_without_leave_to_skip_it_stops_with_step_rank_and_images(shards: Path, tmp_path: Path) -> None:
    options = ("epochs=1", "checkpoint.every_steps=1")
    seen = on_ranks("poisoned", 2, tmp_path, shards, tmp_path / "run", *options)
    for rank in seen:  # all ranks tell the same
        assert re.match(
            r"step 3: the loss is no finite number for train/\S+ \(rank 1\), .* and 3 more: ", rank["error"]
        )
    assert published(tmp_path / "run" / "checkpoints")[0].name == "step-0000000002"


def start(shards: Path, run: Path, log: Path, *options: str, ranks: int = 2) -> "subprocess.Popen[bytes]":
    """A long training under torchrun, once it has done a few steps."""
    call = command("cxr-vae", *arguments(shards, run, "epochs=5000", *options), ranks=ranks)
    with log.open("w") as out:
        torchrun = subprocess.Popen(call, env=environment(), stdout=out, stderr=out)
    while len(read_records(run / "metrics.jsonl")) < 5:
        assert torchrun.poll() is None, log.read_text()
        time.sleep(0.05)
    return torchrun


def rank_processes(run: Path, torchrun: int) -> list[int]:
    return sorted(pid for pid in processes_with(f"run_dir={run}") if pid != torchrun)


def test_a_rank_that_is_killed_ends_the_others_in_seconds(shards: Path, tmp_path: Path) -> None:
    torchrun = start(shards, tmp_path / "run", tmp_path / "log", ranks=3)
    os.kill(rank_processes(tmp_path / "run", torchrun.pid)[1], signal.SIGKILL)
    assert torchrun.wait(HANG_S) != 0
    assert processes_with(f"run_dir={tmp_path / 'run'}") == []
    told = (tmp_path / "log").read_text()
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID \d+", told[-600:])  # torchrun's last words
    assert "cxr_vae/training/train.py" not in told  # no traceback of those that had to follow


def test_a_rank_that_stalls_is_named(shards: Path, tmp_path: Path) -> None:
    torchrun = start(shards, tmp_path / "run", tmp_path / "log", "stall_minutes=1", ranks=3)
    stalled = rank_processes(tmp_path / "run", torchrun.pid)[1]
    os.kill(stalled, signal.SIGSTOP)
    try:
        wait_until(lambda: "no sign of" in (tmp_path / "log").read_text() or torchrun.poll() is not None)
        told = (tmp_path / "log").read_text()
        assert re.search(rf"no sign of rank \d on \S+ \(process {stalled}\) for 60 s, while the others waited", told)
    finally:
        with suppress(ProcessLookupError):  # torchrun's patience was over first
            os.kill(stalled, signal.SIGKILL)
    assert torchrun.wait(HANG_S) != 0
    assert processes_with(f"run_dir={tmp_path / 'run'}") == []


def test_a_rank_that_never_comes_is_named(shards: Path, tmp_path: Path) -> None:
    asleep = with_patch(tmp_path, 'import os, time\nif os.environ.get("RANK") == "1":\n    time.sleep(600)')
    call = command("cxr-vae", *arguments(shards, tmp_path / "run", "stall_minutes=0.2"), ranks=2)
    result = subprocess.run(call, env=asleep, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert result.returncode == 1
    assert "no sign of rank 1 (which never came) for 12 s, while the others waited" in result.stderr


def test_a_rank_whose_torchrun_was_killed_before_it_looked_gives_up(shards: Path, tmp_path: Path) -> None:
    """Its store is gone then, too."""
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))  # kept, so that nobody else listens there
    port = str(probe.getsockname()[1])
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    call = command("cxr-vae", *arguments(shards, tmp_path / "run"))
    result = subprocess.run(
        call, env=environment(**torchrun, **ranks), capture_output=True, text=True, check=False, timeout=HANG_S
    )
    probe.close()
    assert result.returncode == 1
    assert "the other processes of this job could not be found" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_last_words_under_torchrun_are_the_failed_ranks(shards: Path, tmp_path: Path) -> None:
    call = command("cxr-vae", *arguments(shards, tmp_path / "run", "batch_size=1"), ranks=2)
    result = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False, timeout=HANG_S)
    assert result.returncode != 0
    told = "train.batch_size=1 is less than one image for each of 2 processes"
    assert told in result.stderr[-400:]
    (ours,) = (line for line in result.stderr.splitlines() if line.startswith("cxr-vae: error:"))
    assert told in ours  # of the first rank only, though torchrun adds its own account
    bug = command("cxr-vae", *arguments(shards, tmp_path / "run", "batch_size=14"), ranks=2)
    broken = with_patch(tmp_path, BUG_ON_RANK_1)
    result = subprocess.run(bug, env=broken, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert "ZeroDivisionError: a bug on rank 1" in result.stderr[-400:]


BUG_ON_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import cxr_vae.training.schedules as schedules
    def kl_weight(step, config):
        if step == 3:
            raise ZeroDivisionError("a bug on rank 1")
        return 1.0
    schedules.kl_weight = kl_weight
"""
