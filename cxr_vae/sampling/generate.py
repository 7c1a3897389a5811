"""New images from a trained model: `cxr-vae generate`."""

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from cxr_vae.config_file import PRIOR_OPTIONS, override_config
from cxr_vae.console import Progress
from cxr_vae.distributed import World, world
from cxr_vae.errors import UserError
from cxr_vae.files import read_json, write_json
from cxr_vae.noise import BLOCK
from cxr_vae.pictures import save_png
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.sampler import open_sampler
from cxr_vae.weights import load_vae

MARKER = "images.json"
"""Says what the PNGs beside it were made from."""


def generate(
    run: RunDir,
    out: Path,
    num: int,
    overrides: Sequence[str] = (),
    *,
    seed: int | None = None,
    device: str = "auto",
    temperature: float = 1.0,
    label: str | None = None,
) -> Path:
    """Writes `num` images 000000.png … of the run's model into `out`, on one or more ranks.

    Image i is a function of (weights, prior, seed, temperature, label, i), so more can be added later. `overrides` may
    set what is drawn from (PRIOR_OPTIONS). Raises UserError where the run has no weights or no such prior yet, or `out`
    holds anything else.
    """
    with world(device) as here:
        model, _ = load_vae(run.weights, here.device)
        config = override_config(run.saved_config(), overrides, PRIOR_OPTIONS)
        sampler = open_sampler(run, model, config, here.device, seed=seed, temperature=temperature, label=label)
        if here.is_main:
            claim(out, sampler.facts, replace=False)
        here.barrier()
        with Progress(num, "generate", enabled=here.is_main) as progress, ThreadPoolExecutor(4) as pool:
            writing: list[Future[None]] = []
            for start in my_blocks(num, here):
                images = sampler.draw(start, min(start + BLOCK, num), here.device)
                wait(writing)  # of the block before, while this one was computed
                writing = write_images(out, start, images, pool)
                progress.advance(len(images) * here.size)
            wait(writing)
        here.barrier()
    return out


def my_blocks(num: int, here: World) -> range:
    """First positions of this rank's blocks among `num` positions."""
    first, last = here.slice(0, -(-num // BLOCK))
    return range(first * BLOCK, last * BLOCK, BLOCK)


def write_images(folder: Path, start: int, images: Tensor, pool: ThreadPoolExecutor) -> list["Future[None]"]:
    """Begins to write images (n, 1, H, W) uint8 as PNGs numbered from `start`."""
    return [pool.submit(save_png, path_of(folder, start + number), image[0]) for number, image in enumerate(images)]


def path_of(folder: Path, number: int) -> Path:
    """Of the PNG of an image."""
    return folder / f"{number:06d}.png"


def wait(writing: list["Future[None]"]) -> None:
    """Until all is written; raises what went wrong."""
    for one in writing:
        one.result()


def claim(folder: Path, identity: dict[str, Any], *, replace: bool) -> None:
    """Makes `folder` a place for numbered PNGs made from `identity`.

    Where it holds images of another identity they are removed with `replace`, else UserError is raised; anything
    that isn't ours always raises it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new or empty folder for the images")
    marker = folder / MARKER
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    ours = r"\d{6,}\.png|images\.json"
    foreign = sorted(name for name in present if not re.fullmatch(rf"{ours}|\.({ours})\.tmp", name))
    if foreign or (present and not marker.is_file() and any(name.endswith(".png") for name in present)):
        raise UserError(
            f"{folder} holds something else ({(foreign or sorted(present))[0]}); name a new or empty folder"
        )
    if marker.is_file() and read_json(marker, hint=f"delete {folder}") != identity:
        if not replace:
            raise UserError(f"{folder} holds images of other weights or another seed; name a new or empty folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, identity)
