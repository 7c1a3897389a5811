import multiprocessing
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from cxr_vae import locks
from cxr_vae.errors import UserError
from cxr_vae.locks import DirectoryLock
from cxr_vae.training.run_log import read_records
from tests.helpers import HANG_S, check_sentence, command, cxr_vae, environment, wait_until, with_patch
from tests.test_train import arguments


def hold(directory: Path, seconds: float) -> None:
    lock = DirectoryLock(directory, wait_s=0)
    time.sleep(seconds)
    lock.release()


def holder(directory: Path, seconds: float) -> "multiprocessing.process.BaseProcess":
    """Another process that has the lock."""
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(directory, seconds))
    process.start()
    lock = directory / ".lock"
    while process.is_alive() and not (lock.is_file() and lock.read_text().endswith("\n")):
        time.sleep(0.02)
    return process


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    process = holder(tmp_path, 600)
    with pytest.raises(UserError, match=rf"in use by process {process.pid} on {socket.gethostname()} since \d{{4}}-"):
        DirectoryLock(tmp_path, wait_s=0.5)
    process.kill()  # as a crash or a reboot: the kernel lets go
    process.join()
    DirectoryLock(tmp_path, wait_s=0).release()


def test_it_waits_for_one_that_is_leaving(tmp_path: Path) -> None:
    process = holder(tmp_path, 1.5)
    DirectoryLock(tmp_path, wait_s=300).release()
    process.join()


def test_it_waits_longer_for_one_on_another_machine_which_may_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "OTHER_HOST_WAIT_S", 60.0)
    process = holder(tmp_path, 600)
    (tmp_path / ".lock").write_text("process 7 on elsewhere since 2026-11-22 12:00:00\n")
    with pytest.raises(UserError, match="in use by process 7 on elsewhere since"):
        DirectoryLock(tmp_path, wait_s=0)
    monkeypatch.setattr("cxr_vae.locks.time.sleep", lambda _: process.kill())  # when it has been told
    DirectoryLock(tmp_path, wait_s=0.1).release()
    assert "in use by process 7 on elsewhere since 2026-11-22 12:00:00; waiting 60 s" in capsys.readouterr().err
    process.join()


def test_children_of_a_dead_holder_dont_keep_it(tmp_path: Path) -> None:
    """As forked helpers of a killed run would, if the lock were inherited."""
    lock = DirectoryLock(tmp_path, wait_s=0)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    lock.release()
    process = holder(tmp_path, 0)
    process.join()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert process.exitcode == 0


def test_two_runs_on_one_run_directory(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = command("cxr-vae", *arguments(shards, run, "epochs=5000"))
    first = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL)
    while len(read_records(run / "metrics.jsonl")) <= 5:  # an epoch's steps
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # it has the lock, and needs no processor for that
    assert DirectoryLock.__init__.__defaults__ == (20.0,)
    impatient = with_patch(tmp_path, "import cxr_vae.locks\ncxr_vae.locks.DirectoryLock.__init__.__defaults__ = (3.0,)")
    second = subprocess.run(call, env=impatient, capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    assert f"{run} is in use by process {first.pid} on" in second.stderr
    assert "waiting 3 s for it to leave" in second.stderr
    second.stderr = second.stderr.splitlines()[-1]
    check_sentence(second, "is in use by", "wait for it, stop it, or name another directory")
    done = len(read_records(run / "metrics.jsonl"))
    wait_until(lambda: len(read_records(run / "metrics.jsonl")) > done)  # undisturbed
    first.send_signal(signal.SIGTERM)
    assert first.wait(HANG_S) == 75
    assert cxr_vae(*arguments(shards, run, "epochs=1")).returncode == 2  # freed, too short
