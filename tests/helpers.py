"""What several tests need: images to shard, commands in their own processes, checks under torchrun."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxr_vae.checkpoints.manifest import published
from cxr_vae.training.run_log import read_records
from tests.warm import run_warm

TINY = (
    *("image_size=32", "model.channels=[8, 16]", "latent_dim=4", "batch_size=14", "log_every=1", "device=cpu"),
    "precision=fp32",  # some CPUs are many times slower in bf16
)
"""Options of a model and a run that train in seconds."""

HANG_S = 900.0
"""After so long a process hangs: a busy machine takes minutes for what takes seconds."""

PROGRESS = re.compile(r"\w[\w ]*: \d+/\d+ \w+, ")
"""A line that a stage prints every ten seconds, where it takes as long."""

Mistake = tuple[int, str]


CLASSES = ("NORMAL", "PNEUMONIA", "COVID")
"""Those of drawn sources; the third only where it is asked for."""


def draw_source(root: Path, counts: dict[str, tuple[int, ...]], seed: int = 0) -> None:
    """Smooth grey JPEGs: counts[split] = (NORMAL, PNEUMONIA) or (NORMAL, PNEUMONIA, COVID), the first two with Kaggle's
    names."""
    rng = np.random.default_rng(seed)
    number = 0
    for split, of_split in counts.items():
        for label, count in zip(CLASSES, of_split, strict=False):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                number += 1
                name = {
                    "NORMAL": f"IM-{number:04d}-0001",
                    "PNEUMONIA": f"person{number // 2}_bacteria_{number}",
                    "COVID": f"covid {number}",
                }[label]
                draw_image(rng, brighter=label != "NORMAL").save(folder / f"{name}.jpeg", quality=92)


def draw_image(rng: np.random.Generator, *, brighter: bool = False) -> Image.Image:
    """A bright body with two dark fields, of a random size, plus noise."""
    width, height = int(rng.integers(60, 140)), int(rng.integers(60, 110))
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    picture = 200 * np.exp(-((x / 0.8) ** 4) - (y / 1.2) ** 4)
    for side in (-0.4, 0.4):
        centre = side + rng.normal(0, 0.05)
        picture -= (80 if brighter else 130) * np.exp(-(((x - centre) / 0.22) ** 2) - ((y / 0.6) ** 2))
    picture = picture * rng.uniform(0.8, 1.1) + rng.normal(0, 4, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def environment(**extra: str) -> dict[str, str]:
    """The environment for a command of ours: without variables of a surrounding torchrun, or that torch set here."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD_", "LOCAL_", "TORCHINDUCTOR_"))
    }
    # One thread each: several files are tested at once, and threads that outnumber the cores wait for one another.
    one_thread = {"OMP_NUM_THREADS": "1", "CXR_VAE_CORES": "1"}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1])} | one_thread | extra


def with_patch(folder: Path, code: str) -> dict[str, str]:
    """An environment in which Python runs `code` at its start: for faults that can't be had otherwise."""
    library = folder / "library"
    library.mkdir()
    (library / "sitecustomize.py").write_text(code)
    return environment(PYTHONPATH=f"{library}:{Path(__file__).parents[1]}")


HELD = """
import sys
if "cxr_vae" in sys.orig_argv:
    import os, time
    from cxr_vae.stopping import StopSignal
    from cxr_vae.training.loop import Loop
    step, handle, done, told = Loop.step, StopSignal._handle, [], []
    def held(*arguments):
        deadline = time.monotonic() + 1800
        while len(done) >= {steps} and not told and not os.path.exists({go!r}):
            time.sleep(0.02)
            if time.monotonic() > deadline:
                os._exit(2)  # which nothing starts again: the test has failed and forgotten this process
        done.append(1)
        return step(*arguments)
    def noted(*arguments):
        told.append(1)
        return handle(*arguments)
    Loop.step, StopSignal._handle = held, noted
"""


def held_after(steps: int, folder: Path) -> tuple[dict[str, str], Path]:
    """An environment in which trainings wait, after so many steps of a process, to be told to stop or for a file.

    Returned with that file. However slow the machine, none ends before.
    """
    go = folder / "go"
    return with_patch(folder, HELD.format(steps=steps, go=str(go))), go


def command(program: str, *arguments: Any, ranks: int = 1) -> list[str]:
    """`cxr-vae …` or `cxr-launch …`, under torchrun where there is more than one rank."""
    module = {
        "cxr-vae": ["-m", "cxr_vae"],
        "cxr-launch": ["-c", "from launch.cli import main; raise SystemExit(main())"],
    }
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *many, *module[program], *map(str, arguments)]


def cxr_vae(
    *arguments: Any, ranks: int = 1, torchrun: bool = False, program: str = "cxr-vae", **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a command in its own process, or several, with environment `variables`; returns it with its output."""
    if program == "cxr-vae" and not torchrun and "PYTHONPATH" not in variables:
        return run_warm([*map(str, arguments)], environment(**variables), HANG_S, ranks)
    return subprocess.run(
        command(program, *arguments, ranks=ranks),
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def check_sentence(result: "subprocess.CompletedProcess[str]", *parts: str, program: str = "cxr-vae") -> str:
    """A user's mistake: exit code 2, one line on stderr that holds `parts`, no traceback. Returns the line."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip() and not PROGRESS.match(line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{program}: error: ")
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def processes_with(argument: str) -> list[int]:
    """Ids of the processes that have this argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def check_saved_at_its_end(run: Path) -> None:
    """The newest checkpoint is of the last step that was done: it was asked to leave, not killed."""
    last = read_records(run / "metrics.jsonl")[-1]
    assert published(run / "checkpoints")[0].name == f"step-{last['step']:010d}"


def wait_until(condition: Callable[[], object], seconds: float = HANG_S, every_s: float = 0.1) -> None:
    """Waits for what has to come true; asks seldom where that runs a command."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every_s)
