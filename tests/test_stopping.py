import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxr_vae.checkpoints.manifest import published
from cxr_vae.stopping import SAME_INTERRUPT_S, STOPPED_EXIT_CODE, StopSignal
from cxr_vae.training.run_log import read_records
from tests.helpers import HANG_S, command, cxr_vae, environment, with_patch
from tests.test_train import arguments

LONG = ("epochs=5000", "checkpoint.best=false")


def test_a_signal_is_a_reason_to_stop_only_in_the_process_that_asked() -> None:
    with StopSignal() as stop:
        assert stop.reason is None
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if stop.reason is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        stop.defer()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_time_is_a_reason_to_stop() -> None:
    assert StopSignal(max_minutes=1e-6).reason == "train.max_minutes=1e-06"
    assert StopSignal(max_minutes=1e6).reason is None


WAITING = """
import os, signal, sys, time
from cxr_vae.stopping import StopSignal
os.environ["TORCHELASTIC_RUN_ID"] = "1"
with StopSignal() as stop:
    print(os.getpid(), flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the main thread is deaf, as in a C++ library that waits
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, None])
def test_before_the_first_step_it_leaves_at_once(number: signal.Signals | None) -> None:
    """Also in the middle of joining the others, where Python's handlers don't run. None: its torchrun is killed."""
    program = WAITING.replace("SIGNALS", "{signal.SIGTERM, signal.SIGUSR1}")
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {program!r}]))"
    torchrun = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert torchrun.stdout is not None
    pid = int(torchrun.stdout.readline())
    if number is None:
        torchrun.kill()
    else:
        os.kill(pid, number)
    _, told = torchrun.communicate(timeout=HANG_S)  # until the rank, too, has closed its ends
    reason = "the end of torchrun" if number is None else number.name
    assert told == f"stopped before the first step ({reason}); the same command starts again\n"
    if number is not None:
        assert torchrun.returncode == STOPPED_EXIT_CODE


def started(shards: Path, run: Path, ranks: int = 1) -> "subprocess.Popen[str]":
    call = command("cxr-vae", *arguments(shards, run, *LONG), ranks=ranks)
    process = subprocess.Popen(call, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_records(run / "metrics.jsonl")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_it_stops_by_itself_at_its_time_limit(shards: Path, tmp_path: Path) -> None:
    result = cxr_vae(*arguments(shards, tmp_path / "run", *LONG, "max_minutes=0.1"))
    assert result.returncode == STOPPED_EXIT_CODE, result.stderr
    assert "(train.max_minutes=0.1); the same command goes on from there" in result.stdout
    assert len(published(tmp_path / "run" / "checkpoints")) == 1


def test_a_second_interrupt_leaves_at_once(shards: Path, tmp_path: Path) -> None:
    """While the first is still saving, to a disk that hangs."""
    run = tmp_path / "run"
    slow = with_patch(tmp_path, SLOW_DISK)
    call = command("cxr-vae", *arguments(shards, run, *LONG))
    process = subprocess.Popen(call, env=slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_records(run / "metrics.jsonl")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # at the same time: torchrun passes on what the terminal sent already
    time.sleep(SAME_INTERRUPT_S + 4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert "interrupted twice: nothing saved" in out


SLOW_DISK = """
import sys
if "train" in sys.orig_argv:
    import time, cxr_vae.checkpoints.parts as parts
    parts.write_tensors = lambda *arguments: time.sleep(600)
"""


def test_one_ctrl_c_under_torchrun_saves_and_leaves(shards: Path, tmp_path: Path) -> None:
    """The terminal sends it to torchrun and to the ranks, and torchrun once more to the ranks."""
    run = tmp_path / "run"
    call = command("cxr-vae", *arguments(shards, run, *LONG), ranks=2)
    patient = environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")  # for the imports of the first save
    process = subprocess.Popen(
        call, env=patient, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while len(read_records(run / "metrics.jsonl")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=HANG_S)
    assert "(SIGINT); the same command goes on from there" in out
    assert published(run / "checkpoints")[0].name == f"step-{read_records(run / 'metrics.jsonl')[-1]['step']:010d}"
