"""How jobs stand, with a squeue and a sacct that say what a test lets them: `status` and `logs`."""

import getpass
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cxr_vae.run_dir import RunDir
from launch.cli import main
from launch.logs import log_files, show
from launch.records import Record
from launch.slurm_commands import Queued
from launch.status import look, running_job, statuses
from tests.helpers import HANG_S, wait_until


class FakeSlurm:
    """Commands on the PATH that print the lines of a file, and note how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name in ("squeue", "sacct"):
            self.says(name)
            (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\ncat {folder}/{name}.says\n')
            (folder / name).chmod(0o755)

    def says(self, name: str, *lines: str) -> None:
        (self.folder / f"{name}.says").write_text("".join(f"{line}\n" for line in lines))

    def calls(self, name: str) -> list[str]:
        calls = self.folder / "calls"
        return [line for line in calls.read_text().splitlines() if line.startswith(name)] if calls.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def queued(run: Path, job: str, stage: str = "train", **facts: str) -> Record:
    """A job that was submitted to Slurm."""
    record = Record(run / "jobs" / f"{stage}-{job}-abc123")
    record.submitted({"cluster": "slurm", "user": getpass.getuser()} | facts)
    return record


def state(run: Path) -> str:
    (status,) = statuses([RunDir(run)])
    return status.state


def test_slurm_is_asked_for_no_job_whose_files_say_that_it_has_ended(slurm: FakeSlurm, tmp_path: Path) -> None:
    done = queued(tmp_path / "run", "7")
    done.begin("node1", 0, 0)
    done.end("done", "", 5, "end")
    assert state(tmp_path / "run") == "done"
    assert slurm.calls("s") == []
    slurm.says("squeue", "8|RUNNING|None|1:00")
    look([done, queued(tmp_path / "run", "8")])
    assert (len(slurm.calls("squeue")), slurm.calls("sacct")) == (1, [])
    look([done, queued(tmp_path / "run", "8"), queued(tmp_path / "run", "9", "evaluate")])
    (asked,) = slurm.calls("sacct")
    assert asked.endswith("--jobs=9")


def test_who_follows_logs_asks_slurm_seldom_and_hears_of_the_end_at_once(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.status.ASK_EVERY_S", 3600.0)
    record = queued(tmp_path / "run", "7")
    record.begin("node1", 0, 0)
    slurm.says("squeue", "7|RUNNING|None|1:00")
    (tmp_path / "run/logs").mkdir()
    log = tmp_path / "run/logs/run-train-job.log"
    log.write_text("a line\n")
    follower = threading.Thread(target=main, args=(["logs", str(tmp_path / "run"), "--follow"],))
    follower.start()
    wait_until(lambda: slurm.calls("squeue"))
    time.sleep(2)
    assert follower.is_alive()
    log.write_text("a line\nthe last\n")
    record.end("done", "", 5, "end")
    follower.join(HANG_S)
    assert not follower.is_alive()
    assert "the last" in capsys.readouterr().out
    assert len(slurm.calls("squeue")) == 1


def test_who_follows_sees_the_last_lines_of_a_stage_and_the_next_ones(tmp_path: Path) -> None:
    """Also where both came between two looks."""
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    first, second = (run.logs / f"run-{stage}-job.log" for stage in ("train", "prior"))
    first.write_text("begins\n")
    looks = iter([False, True])

    def is_over() -> bool:
        over = next(looks)
        if over:
            first.write_text("begins\nends\n")
            os.utime(first, (1, 1))  # not in the same tick of the clock as the next
            second.write_text("begins, too\n")
        return over

    assert list(show(run, None, follow=True, is_over=is_over)) == [
        "begins",
        "run-train-job: ends",
        "run-prior-job: begins, too",
    ]


def test_a_colleagues_job_is_looked_for_and_keeps_another_from_being_submitted(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    queued(run, "7", user="colleague").begin("node1", 0, 0)
    slurm.says("squeue", "7|RUNNING|None|1:00")
    status = running_job(RunDir(run), "train")
    assert status is not None
    assert (status.job, status.state) == ("7", "running")
    (asked,) = slurm.calls("squeue")
    assert f"--user={os.getuid()},colleague " in asked


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("RUNNING", "running"),
        ("SUSPENDED", "running"),
        ("PENDING", "waiting"),
        ("REQUEUED", "waiting"),
        ("CANCELLED by 0", "cancelled"),
        ("NODE_FAIL", "vanished"),
    ],
)
def test_a_job_that_squeue_does_not_list_is_what_accounting_says(
    slurm: FakeSlurm, tmp_path: Path, told: str, expected: str
) -> None:
    """Where PrivateData hides the jobs of others from squeue."""
    queued(tmp_path / "run", "7", user="colleague").begin("node1", 0, 0)
    slurm.says("sacct", f"7|{told}")
    assert state(tmp_path / "run") == expected


def test_a_chain_here_that_failed_cancels_what_comes_after_and_one_that_was_killed_vanishes(tmp_path: Path) -> None:
    facts = {"cluster": "local", "host": socket.gethostname(), "process_began": 1.0}
    chain = [Record(tmp_path / "run/jobs" / f"{stage}-{os.getpid()}-{stage}") for stage in ("shard", "train")]
    for record in chain:
        record.submitted(facts)

    def found() -> list[str]:
        return [one.state for one in statuses([RunDir(tmp_path / "run")])]

    assert found() == ["vanished", "vanished"]
    chain[0].begin("here", 0, 0)
    assert found() == ["vanished", "vanished"]
    chain[0].end("mistake", "no images", 0, "end")
    assert found() == ["failed", "cancelled"]
    chain[1].submitted(facts | {"process_began": 2.0})  # of another chain, whose process had the same number
    assert found() == ["failed", "vanished"]


@pytest.mark.parametrize("name", ["run", "moved", "."])
def test_logs_are_found_by_their_stage_also_where_the_run_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tmp_path / ("run" if name == "." else name)
    logs = ["evaluate-gpu-1-rank0", "evaluate-job", "train-12_3-job", "train-gpu-1-rank0", "train-gpu-1-rank1"]
    for age, log in enumerate(logs):
        path = run / f"logs/my-train-run-{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (100 - age, 100 - age))
    (run / "logs/other.log").touch()
    monkeypatch.chdir(run)
    asked = RunDir(Path(name) if name == "." else run)

    def found(stage: str | None) -> list[str]:
        return [path.stem.removeprefix("my-train-run-") for path in log_files(asked, stage)]

    assert found("train") == logs[2:]
    assert found("evaluate") == found(None) == logs[:2]
    assert found("prior") == []


@pytest.mark.parametrize(
    ("reason", "for_ever"),
    [
        *((f"QOSMin{what}", True) for what in ("GRES", "CpuNotSatisfied", "Memory", "Node")),
        *((f"QOSMax{what}Job{end}", True) for what, end in (("CpuPer", "Limit"), ("GRESPer", ""), ("MemoryPer", ""))),
        *((f"QOSMax{what}", True) for what in ("NodePerJobLimit", "CpuPerNode", "WallDurationPerJobLimit")),
        *((f"AssocMax{what}", True) for what in ("WallDurationPerJobLimit", "MemPerJob", "CpuMinutesPerJobLimit")),
        *((what, True) for what in ("MaxMemPerLimit", "QOSTimeLimit", "PartitionTimeLimit", "PartitionNodeLimit")),
        *(
            (f"QOSMax{what}", False)
            for what in ("CpuPerUserLimit", "JobsPerUserLimit", "GRESPerUser", "NodePerUserLimit")
        ),
        *((what, False) for what in ("AssocMaxJobsLimit", "QOSGrpCpuLimit", "Resources", "Priority", "Dependency")),
    ],
)
def test_reasons_that_do_not_pass_by_themselves(reason: str, for_ever: bool) -> None:
    assert Queued("PENDING", reason, None).may_wait_for_ever is for_ever
    assert not Queued("RUNNING", reason, None).may_wait_for_ever
