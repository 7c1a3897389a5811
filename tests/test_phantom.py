"""The phantoms: layout, reproducibility, resumption after a kill, and that the pictures have a chest's greys."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cxr_vae.errors import UserError
from cxr_vae.phantoms.anatomy import Anatomy
from cxr_vae.phantoms.drawing import draw_phantom
from cxr_vae.phantoms.folder import MARKER, write_phantoms
from tests.helpers import HANG_S, cxr_vae, with_patch

NUM, SEED = 12, 3
ROOT = Path(__file__).parents[1]
Greys = NDArray[np.float64]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An undisturbed set written by one worker."""
    out = tmp_path_factory.mktemp("phantoms") / "new" / "set"
    counts = write_phantoms(out, NUM, SEED, workers=1)
    assert counts == {
        "train": {"NORMAL": 2, "PNEUMONIA": 6},
        "val": {"NORMAL": 1, "PNEUMONIA": 1},
        "test": {"NORMAL": 1, "PNEUMONIA": 1},
    }
    return contents(out)


@pytest.fixture(scope="module")
def drawn() -> dict[bool, Greys]:
    """Twenty healthy and twelve ill phantoms, as 100 x 100 pixels."""

    def draw(i: int, pneumonia: bool) -> Greys:
        image = draw_phantom(np.random.default_rng([9, i]), pneumonia=pneumonia).convert("L")
        return np.asarray(image.resize((100, 100), Image.Resampling.BOX), dtype=float)

    return {ill: np.stack([draw(i, ill) for i in range(12 if ill else 20)]) for ill in (False, True)}


def test_layout_and_names(reference: dict[str, bytes]) -> None:
    names = {
        "NORMAL": re.compile(r"(NORMAL2-)?IM-\d{4,}-\d{4}\.jpeg"),
        "PNEUMONIA": re.compile(r"person\d+_(bacteria|virus)_\d+\.jpeg"),
    }
    found: Counter[tuple[str, str]] = Counter()
    for path in reference.keys() - {MARKER}:
        split, label, name = path.split("/")
        assert names[label].fullmatch(name)
        found[split, label] += 1
    assert sum(found.values()) == NUM
    assert len(found) == 6
    assert len({path.split("/")[-1] for path in reference}) == NUM + 1
    assert json.loads(reference[MARKER]) == {"num": NUM, "seed": SEED, "version": 1}


def test_the_plan_of_a_large_set() -> None:
    from cxr_vae.phantoms.folder import _plan

    plan = _plan(600, 0)
    split_of = defaultdict(set)
    images: Counter[str] = Counter()
    counts = Counter(tuple(path.split("/")[:2]) for path, _ in plan)
    for path, pneumonia in plan:
        split, label, name = path.split("/")
        assert pneumonia == (label == "PNEUMONIA")
        patient = re.search(r"(?:person|IM-)(\d+)", name)[1]
        split_of[patient].add(split)
        images[patient] += 1
    assert len({path.split("/")[-1] for path, _ in plan}) == 600
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set(images.values()) == {1, 2, 3, 4}
    assert counts["test", "NORMAL"] + counts["test", "PNEUMONIA"] == 96
    assert counts["val", "NORMAL"] + counts["val", "PNEUMONIA"] == 16
    assert counts["train", "NORMAL"] / 488 == pytest.approx(0.27, abs=0.01)
    assert counts["test", "NORMAL"] / 96 == pytest.approx(0.37, abs=0.01)


@pytest.mark.parametrize("num", range(12, 40))
def test_no_folder_is_empty(num: int) -> None:
    from cxr_vae.phantoms.folder import _plan

    assert len({path.rsplit("/", 1)[0] for path, _ in _plan(num, 1)}) == 6


def test_two_workers_and_a_second_call_give_the_same_bytes(reference: dict[str, bytes], tmp_path: Path) -> None:
    write_phantoms(tmp_path, NUM, SEED, workers=2)
    assert contents(tmp_path) == reference
    kept, *lost = sorted(tmp_path.rglob("*.jpeg"))
    for path in lost[::3]:
        path.unlink()
    lost[0].with_name(f".{lost[0].name}.tmp").write_bytes(b"half an image")
    stamp = kept.stat().st_mtime_ns
    write_phantoms(tmp_path, NUM, SEED, workers=1)
    assert contents(tmp_path) == reference
    assert kept.stat().st_mtime_ns == stamp


SLOW_PHANTOMS = """
import functools, time, cxr_vae.phantoms.folder as folder
write = folder._write_phantom
@functools.wraps(write)
def slow(*arguments):
    write(*arguments)
    time.sleep({seconds})
folder._write_phantom = slow
"""
"""In each worker: so that not all is done before it is interrupted."""


@contextmanager
def running(out: Path, num: int, images: int, pause_s: float) -> Iterator["subprocess.Popen[str]"]:
    """A process, leader of its own group, that writes a set with two workers and has some images done."""
    code = f"from cxr_vae.phantoms.folder import write_phantoms; write_phantoms({str(out)!r}, {num}, {SEED}, workers=2)"
    slowly = with_patch(out.parent, SLOW_PHANTOMS.format(seconds=pause_s))
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=slowly, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    try:
        while len(list(out.rglob("*.jpeg"))) < images:
            assert run.poll() is None
            time.sleep(0.005)
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def test_a_killed_run_is_finished(reference: dict[str, bytes], tmp_path: Path) -> None:
    with running(tmp_path / "out", NUM, images=1, pause_s=600) as run:
        run.kill()
        run.communicate(timeout=HANG_S)  # until the last worker, which holds stderr too, has followed its parent
        assert run.returncode == -signal.SIGKILL
        assert 1 <= len(list(tmp_path.rglob("*.jpeg"))) < NUM
    write_phantoms(tmp_path / "out", NUM, SEED, workers=1)
    assert contents(tmp_path / "out") == reference


def test_it_takes_as_many_cores_as_its_launcher_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pool(workers: int) -> None:
        asked.append(workers)
        raise InterruptedError

    monkeypatch.setattr("cxr_vae.phantoms.folder.worker_pool", pool)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CXR_VAE_CORES", "3")
    with pytest.raises(InterruptedError):
        write_phantoms(tmp_path, NUM, SEED)
    assert asked == [3]


def test_ctrl_c_leaves_promptly_and_without_workers(tmp_path: Path) -> None:
    with running(tmp_path / "out", 2000, images=12, pause_s=1) as run:  # of both workers
        os.killpg(run.pid, signal.SIGINT)  # to all, as the terminal does
        _, errors = run.communicate(timeout=HANG_S)
    assert run.returncode == -signal.SIGINT
    assert errors.startswith("Traceback")  # no progress bar before it: stderr is no terminal
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # none from a worker
    assert len(list(tmp_path.rglob("*.jpeg"))) < 200


def test_sizes_and_modes() -> None:
    lots = {
        ill: [Anatomy.sample(np.random.default_rng([1, i]), pneumonia=ill) for i in range(2000)]
        for ill in (False, True)
    }
    widths = {ill: np.array([a.size[0] for a in some]) for ill, some in lots.items()}
    shapes = np.array([a.size for ill in (False, True, True, True) for a in lots[ill]])
    aspects = shapes[:, 0] / shapes[:, 1]
    assert np.median(widths[False]) == pytest.approx(1650, rel=0.05)
    assert np.median(widths[True]) == pytest.approx(1150, rel=0.05)
    assert np.median(shapes[:, 0]) == pytest.approx(1280, rel=0.05)
    assert np.median(aspects) == pytest.approx(1.42, rel=0.03)
    assert shapes[:, 0].min() >= 399
    assert shapes[:, 0].max() <= 2890
    assert aspects.min() >= 0.83
    assert aspects.max() <= 3.21
    assert np.mean(aspects > 2.2) < 0.05
    assert not any(a.rgb for a in lots[False])
    assert np.mean([a.rgb for a in lots[True]]) == pytest.approx(0.07, abs=0.02)


def test_an_rgb_phantom_has_equal_channels() -> None:
    seed = next(i for i in range(999) if Anatomy.sample(np.random.default_rng(i), pneumonia=True).rgb)
    image = draw_phantom(np.random.default_rng(seed), pneumonia=True)
    assert image.mode == "RGB"
    red, green, blue = image.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()


def test_a_phantom_has_the_size_it_drew_and_depends_on_the_rng_alone() -> None:
    one, again, other = (draw_phantom(np.random.default_rng(seed), pneumonia=True) for seed in (5, 5, 6))
    assert one.size == Anatomy.sample(np.random.default_rng(5), pneumonia=True).size
    assert one.tobytes() == again.tobytes()
    assert one.resize((32, 32)).tobytes() != other.resize((32, 32)).tobytes()


def region(images: Greys, left: float, top: float, right: float, bottom: float) -> float:
    """The mean grey of a part, given in shares of width and height."""
    rows, columns = (slice(round(100 * start), round(100 * end)) for start, end in ((top, bottom), (left, right)))
    return float(images[:, rows, columns].mean())


def test_the_greys_of_a_chest(drawn: dict[bool, Greys]) -> None:
    normal = drawn[False]
    lungs = (region(normal, 0.2, 0.35, 0.35, 0.6) + region(normal, 0.68, 0.35, 0.83, 0.6)) / 2
    mediastinum = region(normal, 0.45, 0.35, 0.55, 0.6)
    abdomen = region(normal, 0.3, 0.9, 0.7, 0.97)
    corners = (region(normal, 0, 0.85, 0.03, 1) + region(normal, 0.97, 0.85, 1, 1)) / 2
    assert corners < lungs - 15
    assert lungs < mediastinum - 50
    assert lungs < abdomen - 60
    everything = np.concatenate(list(drawn.values()))
    assert 110 < everything.mean() < 145
    assert 48 < everything.std(axis=(1, 2)).mean() < 70


def test_the_right_is_on_the_left_and_the_heart_on_the_right(drawn: dict[bool, Greys]) -> None:
    assert region(drawn[False], 0.6, 0.5, 0.66, 0.65) > region(drawn[False], 0.34, 0.5, 0.4, 0.65) + 40


def test_pneumonia_whitens_the_lungs(drawn: dict[bool, Greys]) -> None:
    def whiteness(some: Greys) -> float:
        """Of the lungs, between the mediastinum (1) and black (0): so that the film's contrast hardly counts."""
        lungs = (region(some, 0.2, 0.35, 0.35, 0.6) + region(some, 0.68, 0.35, 0.83, 0.6)) / 2
        return lungs / region(some, 0.45, 0.35, 0.55, 0.6)

    assert whiteness(drawn[True]) > whiteness(drawn[False]) + 0.08


def refused(*words: str) -> AbstractContextManager[object]:
    """The call fails with one line, of one sentence, that has these words."""
    return pytest.raises(
        UserError, match=r"\A(?!.*\. [A-Z])" + "".join(f"(?=.*{re.escape(w)})" for w in words) + r".*\Z"
    )


@pytest.mark.parametrize("num", [11, 10**7])
def test_numbers_out_of_range(tmp_path: Path, num: int) -> None:
    with refused(f"num is {num}, but must be from 12 to 100000"):
        write_phantoms(tmp_path / "set", num)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("option", [("--workers", 0), ("--seed", -1)])
def test_options_out_of_range(tmp_path: Path, option: tuple[str, int]) -> None:
    result = cxr_vae("phantom", tmp_path / "set", *option)
    assert result.returncode == 2
    assert option[0] in result.stderr
    assert not (tmp_path / "set").exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    with refused(str(tmp_path), "'thesis.txt'", "empty folder"):
        write_phantoms(tmp_path, 12)
    with refused(str(mine), "is a file"):
        write_phantoms(mine, 12)
    with refused(str(mine / "below"), "cannot be made or written"):
        write_phantoms(mine / "below", 12)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_other_arguments_than_before(tmp_path: Path, reference: dict[str, bytes]) -> None:
    (tmp_path / MARKER).write_bytes(reference[MARKER])
    for other in ({"num": NUM + 1, "seed": SEED}, {"num": NUM, "seed": SEED + 1}):
        with refused(str(tmp_path), str(other["num"]), str(other["seed"]), "new folder"):
            write_phantoms(tmp_path, **other)
    (tmp_path / MARKER).write_text("{half\na marker")
    with refused(str(tmp_path), "{half a marker", "new folder"):
        write_phantoms(tmp_path, NUM, SEED)
    assert [p.name for p in tmp_path.iterdir()] == [MARKER]


def test_importing_is_cheap() -> None:
    code = "import sys, cxr_vae.phantoms.folder; print(sorted({'torch', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
