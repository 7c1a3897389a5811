"""A folder of phantoms in the layout of Kaggle's chest-xray-pneumonia: `cxr-vae phantom`."""

import json
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np

from cxr_vae.console import Progress
from cxr_vae.errors import UserError
from cxr_vae.files import write_atomically
from cxr_vae.phantoms.drawing import VERSION, draw_phantom
from cxr_vae.workers import num_cores, worker_pool

MARKER = ".phantoms.json"
MIN_NUM, MAX_NUM = 12, 100_000


def _plan(num: int, seed: int) -> list[tuple[str, bool]]:
    """The files of a set in the order of their making: the path below OUT, and whether it shows pneumonia."""
    rng, patient = np.random.default_rng([seed, num, 1]), 0
    files: list[tuple[str, bool]] = []
    test, val = max(2, round(0.16 * num)), max(2, round(num * 16 / 600))
    for split, size, share in (("train", num - test - val, 0.27), ("val", val, 0.5), ("test", test, 0.37)):
        healthy = min(max(1, round(share * size)), size - 1)
        for pneumonia, left in ((False, healthy), (True, size - healthy)):
            while left:
                images = min(left, 1 + int(rng.choice(4, p=(0.76, 0.14, 0.06, 0.04))))
                patient += int(rng.integers(1, 4))
                prefix, kind = rng.choice(("IM", "NORMAL2-IM")), rng.choice(("bacteria", "bacteria", "virus"))
                for i in range(images):
                    if pneumonia:
                        name = f"PNEUMONIA/person{patient}_{kind}_{len(files) + 1}.jpeg"
                    else:
                        name = f"NORMAL/{prefix}-{patient:04d}-{i + 1:04d}.jpeg"
                    files.append((f"{split}/{name}", pneumonia))
                left -= images
    return files


def _claim(out: Path, asked: str) -> None:
    """Make OUT ours by its marker, or find that it is ours and of the same arguments."""
    marker = out / MARKER
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, where the phantoms need a folder: name a new or an empty one")
    if marker.is_file():
        found = " ".join(marker.read_text("utf-8", errors="replace").split())
        if found != asked:
            raise UserError(
                f"{out} was begun with {found[:100]}, but asked for is {asked}: give the same or name a new folder"
            )
        return
    ours = f".{MARKER}.tmp"  # what a kill may leave of the writing below
    others = sorted(path.name for path in out.iterdir() if path.name != ours) if out.exists() else []
    if others:
        raise UserError(f"{out} holds {others[0]!r} and no {MARKER}, so it is not ours: name a new or an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, asked)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made or written ({error.strerror}): name another") from error


def _write_phantom(path: Path, pneumonia: bool, seed: int, index: int) -> None:
    """Draw one image and put it in its place, whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")  # that of a killed run is written over
    draw_phantom(np.random.default_rng([seed, index]), pneumonia=pneumonia).save(draft, "JPEG", quality=90)
    draft.replace(path)


def write_phantoms(out: Path, num: int, seed: int = 0, *, workers: int | None = None) -> dict[str, dict[str, int]]:
    """Write `num` phantoms as OUT/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg; return the count of each split and class.

    The bytes depend on `num` and `seed` alone, not on `workers` (processes; default: one for each core). A call with
    the same arguments finishes what a killed one left, and keeps the files that are there; one call at a time.

    Raises `UserError` if `num` is out of range, or OUT is a file, holds anything that is not ours, or was begun with
    other arguments.
    """
    if not MIN_NUM <= num <= MAX_NUM:
        raise UserError(f"num is {num}, but must be from {MIN_NUM} to {MAX_NUM}")
    out = Path(out)
    _claim(out, json.dumps({"num": num, "seed": seed, "version": VERSION}))
    files = _plan(num, seed)
    counts: dict[str, dict[str, int]] = {}
    for folder, number in Counter(Path(file).parent for file, _ in files).items():
        counts.setdefault(folder.parent.name, {})[folder.name] = number
        (out / folder).mkdir(parents=True, exist_ok=True)
    todo = [(out / file, ill, seed, i) for i, (file, ill) in enumerate(files) if not (out / file).exists()]
    with (
        Progress(num, "phantoms", done=num - len(todo)) as progress,
        worker_pool(min(workers or num_cores(), len(todo) or 1)) as pool,
    ):
        for done in as_completed([pool.submit(_write_phantom, *job) for job in todo]):
            done.result()
            progress.advance()
    return counts
