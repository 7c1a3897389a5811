import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from cxr_vae.stopping import STOPPED_EXIT_CODE
from launch.clusters import Job, in_background
from launch.records import Attempt, RankEnd, Record
from launch.stages import Stage
from launch.starters import Here, free_port
from launch.supervisor import Supervisor, decide, judge
from tests.helpers import HANG_S


def ends(*codes: int | None) -> list[RankEnd]:
    """In the order of time."""
    return [RankEnd(rank, "node1", code, float(rank)) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ((0, 0), "done"),
        ((75, 75), "stopped"),
        ((75, 1), "stopped"),  # what came after the first is its consequence
        ((128 + signal.SIGINT, 1), "stopped"),  # Ctrl-C, outside of a training
        ((1, 75), "crashed"),
        ((2, 1), "mistake"),
        ((-signal.SIGKILL, 1), "crashed"),
        ((-signal.SIGTERM, -signal.SIGTERM), "stopped"),  # sharding, which has nothing to save
        ((0, None), "lost"),
        ((None, 1), "crashed"),
        ((0,), "lost"),  # of two ranks: one never began
    ],
)
def test_every_rank_has_its_say_and_the_first_to_end_tells_why(codes: tuple[int | None, ...], outcome: str) -> None:
    assert judge(ends(*codes), 2, [0])[0] == outcome


class BackInTheQueue(Here):
    def requeue(self) -> None:
        return None


def test_back_in_the_queue_it_leaves_when_slurm_ends_it_and_not_before(tmp_path: Path) -> None:
    supervisor = Supervisor(Stage("train", (), tmp_path, tmp_path), BackInTheQueue())
    began = time.monotonic()
    for after_s, number in ((0.5, signal.SIGUSR2), (3.0, signal.SIGTERM)):
        threading.Timer(after_s, os.kill, (os.getpid(), number)).start()
    with supervisor._signals_passed_on():
        assert supervisor.requeue(Record.read(tmp_path / "train-7")) == STOPPED_EXIT_CODE
    assert 3 <= time.monotonic() - began < 300  # it would have waited for 600


@pytest.mark.parametrize(("code", "outcome"), [(0, "done"), (2, "mistake"), (75, "stopped"), (137, "crashed")])
def test_without_a_word_from_any_rank_the_exit_code_counts(code: int, outcome: str) -> None:
    assert judge([], 4, [code])[0] == outcome


def attempts(*seen: tuple[str | None, int, int]) -> list[Attempt]:
    """From outcome and progress before and after."""
    return [
        Attempt(number, 0.0, "node1", before, 0, outcome and 1.0, outcome, "", after if outcome else None)
        for number, (outcome, before, after) in enumerate(seen, start=1)
    ]


def following(*seen: tuple[str | None, int, int], near_limit: bool = False) -> str:
    return decide(attempts(*seen), can_requeue=True, near_limit=near_limit)[0]


def test_what_is_stopped_goes_back_into_the_queue_any_number_of_times() -> None:
    assert following(("stopped", 0, 0)) == "requeue"
    assert following(*[("stopped", 0, 0)] * 19) == "requeue"  # thrown out before the first step, again and again
    assert following(*[("stopped", 0, 0)] * 20) == "end"
    assert following(*[("stopped", 0, 0), ("lost", 0, 0)] * 10) == "end"
    assert following(*[("stopped", step, step + 1) for step in range(50)], near_limit=True) == "requeue"


def test_a_whole_time_limit_without_progress_is_the_end() -> None:
    told = decide(attempts(("stopped", 5, 5)), can_requeue=True, near_limit=True)
    assert told == ("end", "a whole time limit brought it no step further: raise resources.hours")
    assert following(("crashed", 0, 5), ("stopped", 5, 5), near_limit=True) == "requeue"  # it did, before


def test_crashes_are_tried_again_while_they_bring_something() -> None:
    assert following(("crashed", 0, 0)) == "again"
    assert following(("crashed", 0, 0), ("crashed", 0, 0)) == "end"
    assert following(("crashed", 0, 0), (None, 0, 0), ("crashed", 0, 0)) == "end"
    assert following(("crashed", 0, 0), ("crashed", 0, 7), ("crashed", 7, 7)) == "again"
    assert following(*[("crashed", step, step + 1) for step in range(50)]) == "again"
    assert following(("crashed", 0, 3), near_limit=True) == "requeue"


def test_lost_ranks_go_back_into_the_queue_for_other_nodes() -> None:
    assert following(("lost", 0, 0)) == "requeue"
    assert following(*[("lost", 0, 0)] * 10) == "end"


def test_mistakes_and_cancelled_jobs_end() -> None:
    assert following(("mistake", 0, 5)) == "end"
    assert following(("done", 0, 5)) == "end"
    assert following(("cancelled", 0, 5)) == "end"


def test_a_record_survives_its_process_and_a_line_cut_short(tmp_path: Path) -> None:
    record = Record.read(tmp_path / "train-7")
    record.begin("node1", 0, 0)
    record.end("crashed", "why", 5, "again")
    record.begin("node2", 5, 0)
    with (record.path / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "ended": 1.0, "outc')
    again = Record.read(record.path)
    assert [(one.number, one.outcome, one.progress, one.host) for one in again.attempts] == [
        (1, "crashed", 0, "node1"),
        (2, None, 5, "node2"),
    ]
    assert (again.stage, again.job) == ("train", "7")


def test_a_full_disk_is_no_reason_to_forget(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record = Record.read(tmp_path / "file" / "train-7")  # nothing can be written below a file
    record.begin("node1", 0, 0)
    record.end("stopped", "why", 5, "requeue")
    assert record.attempts[-1].outcome == "stopped"


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda _: 7)
    port = free_port()
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        assert free_port() != port
    assert 20000 <= port < 32000


def test_a_chain_stops_at_a_stage_that_fails_unless_it_is_a_sweep(tmp_path: Path) -> None:
    stages = [
        Stage("report", ("report", str(tmp_path / "nowhere")), tmp_path / name, tmp_path)
        for name in ("first", "second")
    ]
    assert psutil.Process(in_background(Job(tuple(stages), Here()))).wait(HANG_S) == 2
    assert "report mistake: " in stages[0].job_log.read_text()
    assert not (tmp_path / "second").exists()
    assert psutil.Process(in_background(Job(tuple(stages), Here(), keep_going=True))).wait(HANG_S) == 2
    assert list((tmp_path / "second/logs").glob("second-report-*-rank0.log"))
    assert stages[0].job_log.read_text().count("attempt 1 on") == 2
    assert stages[1].job_log.read_text().count("attempt 1 on") == 1


def test_a_process_that_came_by_an_old_number_is_not_taken_for_the_job(tmp_path: Path) -> None:
    record = Record(tmp_path / f"train-{os.getpid()}-abc123")
    began = psutil.Process().create_time()
    record.submitted({"host": socket.gethostname(), "process_began": began})
    assert record.process() == psutil.Process()
    for facts in ({"process_began": began - 5}, {"process_began": began, "host": "elsewhere"}, {}):
        record.submitted({"host": socket.gethostname()} | facts)
        assert record.process() is None
