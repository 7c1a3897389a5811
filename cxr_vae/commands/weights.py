"""The commands that look at the weights of a run: `cxr-vae checkpoints` and `export`."""

import argparse
from pathlib import Path
from typing import Any

from cxr_vae.commands.command_line import add_command


def add_checkpoints(commands: Any) -> None:
    """`cxr-vae checkpoints` among the commands."""
    parser = add_command(
        commands,
        "checkpoints",
        checkpoints,
        "Lists a run's checkpoints, newest first, and says whether they are whole; exits with 1 where one is not.",
        "cxr-vae checkpoints runs/reference --verify",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--verify", action="store_true", help="read every byte, not only names and sizes")


def checkpoints(arguments: argparse.Namespace) -> int:
    """`cxr-vae checkpoints`."""
    from cxr_vae.commands.checkpoints import list_checkpoints
    from cxr_vae.run_dir import RunDir

    table, all_whole = list_checkpoints(RunDir(arguments.run), every_byte=arguments.verify)
    print(table)
    return 0 if all_whole else 1


def add_export(commands: Any) -> None:
    """`cxr-vae export` among the commands."""
    parser = add_command(
        commands,
        "export",
        export,
        "Writes the weights of one of a run's checkpoints, the averaged ones if train.ema_decay is on, as one "
        "safetensors file with the configuration inside. It works while the run goes on.",
        "cxr-vae export runs/reference --checkpoint best --decoder decoder.pt2",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest, best (by test loss) or a name such as step-…"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN/vae_<checkpoint>.safetensors)")
    parser.add_argument(
        "--decoder",
        type=Path,
        metavar="FILE",
        help="also write the decoder, latents to images in [0, 1], as a torch.export program (.pt2)",
    )


def export(arguments: argparse.Namespace) -> int:
    """`cxr-vae export`."""
    from cxr_vae.commands.export import export_run
    from cxr_vae.run_dir import RunDir

    for path in export_run(RunDir(arguments.run), arguments.checkpoint, arguments.out, arguments.decoder):
        print(path)
    return 0
