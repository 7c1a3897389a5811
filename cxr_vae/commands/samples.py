"""The commands that fit a prior and draw from it: `cxr-vae prior` and `generate`."""

import argparse
import os
from pathlib import Path
from typing import Any

from cxr_vae.commands.command_line import add_command, add_overrides, deviation, positive, rank, seed


def add_prior(commands: Any) -> None:
    """`cxr-vae prior`."""
    parser = add_command(
        commands,
        "prior",
        prior,
        "Fits a prior to the latents of a trained run's training images: what new images are then drawn from, beside "
        "the standard normal. The same command goes on after a break.",
        "cxr-vae prior runs/reference name=gmm",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    add_overrides(parser)


def prior(arguments: argparse.Namespace) -> int:
    """`cxr-vae prior`."""
    from cxr_vae.stopping import STOPPED_EXIT_CODE  # isort: skip  (notes the parent, which may be killed any time)
    from cxr_vae.console import outlive_full_log_disk

    outlive_full_log_disk()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what `World.parallel` asks for
    from cxr_vae.run_dir import RunDir
    from cxr_vae.training.fit_prior import fit_prior  # loads torch, which looks at it once

    return 0 if fit_prior(RunDir(arguments.run), arguments.overrides) else STOPPED_EXIT_CODE


def add_generate(commands: Any) -> None:
    """`cxr-vae generate`."""
    parser = add_command(
        commands,
        "generate",
        generate,
        "Writes new images from a trained run as PNGs: of the standard prior, or of one that `cxr-vae prior` fitted. "
        "Options of the prior such as prior.guidance=2 may be given.",
        "cxr-vae generate runs/reference --num 64 --out samples --prior gmm --label PNEUMONIA",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--num", type=positive, default=64, help="images")
    parser.add_argument("--out", type=Path, required=True, help="new folder for 000000.png …")
    parser.add_argument("--seed", type=seed, help="of the latents (default: the run's seed)")
    parser.add_argument("--temperature", type=deviation, default=1.0, help="standard deviation of the noise")
    parser.add_argument("--prior", metavar="NAME", help="what to draw from (default: prior.name of the run)")
    parser.add_argument("--label", metavar="CLASS", help="of all images (default: as frequent as in training)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if any")
    add_overrides(parser)


def generate(arguments: argparse.Namespace) -> int:
    """`cxr-vae generate`."""
    from cxr_vae.run_dir import RunDir
    from cxr_vae.sampling.generate import generate as run_generation

    wanted = {name: getattr(arguments, name) for name in ("seed", "device", "temperature", "label")}
    prior = [f"prior.name={arguments.prior}"] if arguments.prior else []
    run_generation(RunDir(arguments.run), arguments.out, arguments.num, [*arguments.overrides, *prior], **wanted)
    if rank() == 0:
        print(f"{arguments.num} images: {arguments.out}")
    return 0
