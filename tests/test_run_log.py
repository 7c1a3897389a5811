import json
import subprocess
from concurrent.futures import Future
from pathlib import Path

import pytest

from cxr_vae import run_dir
from cxr_vae.run_dir import RunDir, git_revision
from cxr_vae.training.loop import Loop
from cxr_vae.training.run_log import RunLog, cut_after, read_records
from cxr_vae.training.stopwatch import Stopwatch


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"kind": "step", "step": step, "x": "y" * step}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (b"", b""),
        (lines(1, 2, 3), lines(1, 2)),
        (lines(1, 2, 2, 5, 5, 9), lines(1, 2, 2)),
        (lines(1, 2) + lines(3)[:-5], lines(1, 2)),  # cut short by a kill
        (lines(1) + lines(2)[:-1], lines(1)),  # whole but for its end: written again
        (lines(3, 4), b""),
        (b'{"kind', b""),
        (lines(1) + b"12\n{}\n", lines(1)),
        (lines(1) + bytes(100) + b"\n" + lines(2)[:9], lines(1)),  # by a power cut
    ],
)
def test_records_of_lost_work_are_cut_off(tmp_path: Path, found: bytes, kept: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(found)
    cut_after(tmp_path / "a.jsonl", 2)
    assert (tmp_path / "a.jsonl").read_bytes() == kept


def test_resuming_a_long_log_reads_only_its_end(tmp_path: Path) -> None:
    """A file of 100 GB, most of it a hole: reading it would take minutes."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.seek(100 * 10**9)
        file.write(b"\n" + lines(7, 8, 9))
    cut_after(path, 8)
    with path.open("rb") as file:
        file.seek(100 * 10**9 + 1)
        assert file.read() == lines(7, 8)


def test_what_a_full_disk_refuses_is_kept_until_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    log = RunLog(run, 0, Stopwatch())

    class Full:
        """Takes ten bytes more."""

        room = 10

        def write(self, data: bytes) -> int:
            count = min(self.room, len(data))
            self.room -= count
            if not count:
                raise OSError(28, "No space left on device")
            return file.write(data[:count])

        def fileno(self) -> int:
            return int(file.fileno())

    file = log._metrics._file
    monkeypatch.setattr(log._metrics, "_file", full := Full())
    for step in (1, 2, 3):
        log.write("step", step, {})
    assert run.metrics.stat().st_size == 10
    with pytest.raises(OSError, match="No space left") as caught:
        log.sync()
    assert caught.value.filename == str(run.metrics)
    full.room = 10**6
    log.write("step", 4, {})
    log.sync()
    assert [record["step"] for record in read_records(run.metrics)] == [1, 2, 3, 4]
    log.close()


def test_a_save_may_meet_pictures_that_are_just_done(tmp_path: Path) -> None:
    """A checkpoint's thread waits for those being written, while the loop finds them done and forgets them."""

    done: Future[None] = Future()
    done.set_result(None)
    answers = iter([(1, done), None])

    class Forgetting:
        log = RunLog(RunDir(tmp_path), 0, Stopwatch(), enabled=False)
        _writing = property(lambda _: next(answers))

    Loop.settle(Forgetting())


def test_the_commit_is_that_of_our_own_checkout_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a project in whose folder we are installed."""
    project, worktree = tmp_path / "project", tmp_path / "worktree"
    for call in (
        ["init", "--quiet", project],
        ["-C", project, "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--allow-empty", "-m", "x"],
        ["-C", project, "worktree", "add", "--quiet", worktree],  # whose .git is a file
    ):
        subprocess.run(["git", *map(str, call)], check=True)
    told = subprocess.run(["git", "-C", project, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    for folder, commit in ((project, told.stdout.strip()), (worktree, told.stdout.strip()), (project / "venv", None)):
        (folder / "cxr_vae").mkdir(parents=True)
        monkeypatch.setattr(run_dir, "__file__", str(folder / "cxr_vae" / "run_dir.py"))
        assert git_revision() == commit
