"""The `cxr-vae` command. Each stage is imported when it is asked for, so that `--help` needs no torch."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_vae import __version__
from cxr_vae.commands.command_line import add_command, add_overrides, parse, positive, rank, run, seed, share
from cxr_vae.commands.data import add_inspect, add_split
from cxr_vae.commands.samples import add_generate, add_prior
from cxr_vae.commands.weights import add_checkpoints, add_export


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 a mistake of the user's, 75 stopped by a signal."""
    arguments = parse(build_parser(), argv)
    return run(arguments.command, arguments, "cxr-vae")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cxr-vae",
        description="Variational autoencoders on chest X-rays: folder → shards → training → images and figures.",
        epilog="Each command says more with --help. The same command starts a stage and resumes it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_phantom(commands)
    add_split(commands)
    _add_shard(commands)
    add_inspect(commands)
    _add_train(commands)
    add_checkpoints(commands)
    add_export(commands)
    add_prior(commands)
    add_generate(commands)
    _add_evaluate(commands)
    _add_audit(commands)
    _add_report(commands)
    _add_fetch_weights(commands)
    _add_config(commands)
    return parser


def _add_phantom(commands: Any) -> None:
    parser = add_command(
        commands,
        "phantom",
        phantom,
        "Draws chest phantoms in the layout of Kaggle's chest-xray-pneumonia. They are for trying things out and for "
        "tests, not for science.",
        "cxr-vae phantom data/phantoms --num 600",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write train/, val/ and test/ into")
    parser.add_argument("--num", type=int, default=600, help="images in all")
    parser.add_argument("--seed", type=seed, default=0, help="of everything drawn")
    parser.add_argument("--workers", type=positive, help="processes (default: one a core)")


def phantom(arguments: argparse.Namespace) -> int:
    """`cxr-vae phantom`."""
    from cxr_vae.phantoms.folder import write_phantoms

    counts = write_phantoms(arguments.out, arguments.num, arguments.seed, workers=arguments.workers)
    print(f"{arguments.out}: {sum(sum(split.values()) for split in counts.values())} phantoms, {in_words(counts)}")
    return 0


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`train 484 (NORMAL 131, PNEUMONIA 353), test …`."""
    return ", ".join(
        f"{split} {sum(classes.values())} ({', '.join(f'{name} {count}' for name, count in classes.items())})"
        for split, classes in counts.items()
    )


def _add_shard(commands: Any) -> None:
    parser = add_command(
        commands,
        "shard",
        shard,
        "Writes a folder of X-rays as WebDataset tars of 8-bit grey squares with an index. The folder holds "
        "split/class/*.jpg|jpeg|png, as Kaggle's does. The same command goes on after a break.",
        "cxr-vae shard chest_xray shards/kaggle_224",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of X-rays; it is only read")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for the shards")
    parser.add_argument("--image-size", type=int, default=224, help="height and width in pixels")
    parser.add_argument(
        "--fit",
        choices=("stretch", "letterbox", "crop"),
        default="stretch",
        help="how other aspect ratios become square",
    )
    parser.add_argument(
        "--format", choices=("png", "jpg", "raw"), default="png", help="png and raw are lossless; jpg has quality 95"
    )
    parser.add_argument(
        "--split-file", type=Path, metavar="FILE", help="CSV of `cxr-vae split` (default: splits as the folders say)"
    )
    parser.add_argument(
        "--max-rejected", type=share, default="1%", help="unreadable images to put up with, 1%% or 0.01"
    )
    parser.add_argument("--workers", type=positive, help="processes (default: one a core)")


def shard(arguments: argparse.Namespace) -> int:
    """`cxr-vae shard`."""
    from cxr_vae.console import outlive_full_log_disk
    from cxr_vae.data.shards import write_shards
    from cxr_vae.data.tars import Preprocessing

    outlive_full_log_disk()
    directory = write_shards(
        arguments.source,
        arguments.out,
        Preprocessing(arguments.image_size, arguments.fit, arguments.format),
        split_file=arguments.split_file,
        max_rejected=arguments.max_rejected,
        workers=arguments.workers,
    )
    manifest = directory.manifest
    counts = {name: split["count_per_class"] for name, split in manifest["splits"].items()}
    print(f"{arguments.out}: {in_words(counts)} at {manifest['image_size']} px")
    if manifest.get("num_not_in_split_file"):
        print(f"{manifest['num_not_in_split_file']} images left out: {arguments.split_file} doesn't list them")
    if manifest["num_rejected"] or manifest["num_ignored"]:
        listed = arguments.out / "rejected.csv"
        print(f"{manifest['num_rejected']} images rejected, {manifest['num_ignored']} other files ignored: {listed}")
    return 0


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        train,
        "Trains as a configuration says, alone or under torchrun. The same command goes on after a break; after a "
        "signal (TERM, INT, USR1, USR2) it saves a checkpoint and exits with 75.",
        "torchrun --standalone --nproc-per-node 2 -m cxr_vae train configs/reference.yaml epochs=10",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    add_overrides(parser)


def train(arguments: argparse.Namespace) -> int:
    """`cxr-vae train`."""
    from cxr_vae.stopping import STOPPED_EXIT_CODE  # isort: skip  (notes the parent, which may be killed any time)
    from cxr_vae.config_file import load_config
    from cxr_vae.console import outlive_full_log_disk

    outlive_full_log_disk()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what `World.parallel` asks for
    config = load_config(arguments.config, arguments.overrides)  # before torch is loaded: mistakes show at once
    from cxr_vae.training.train import train as run_training

    return 0 if run_training(config) else STOPPED_EXIT_CODE


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "Generates images from a trained run, compares them with real ones and writes FID, KID and Inception Score, "
        "alone or under torchrun.",
        "cxr-vae evaluate runs/reference num_generated=1000",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    add_overrides(parser)


def evaluate(arguments: argparse.Namespace) -> int:
    """`cxr-vae evaluate`."""
    from cxr_vae.console import outlive_full_log_disk
    from cxr_vae.evaluation.evaluate import evaluate as run_evaluation
    from cxr_vae.report.inputs import Results
    from cxr_vae.report.summary import figures_table
    from cxr_vae.run_dir import RunDir

    outlive_full_log_disk()
    run = RunDir(arguments.run)
    results = run_evaluation(run, arguments.overrides)
    if rank() == 0:
        print(f"\n{figures_table(Results.model_validate(results))}\n\n{run.results}")
    return 0


def _add_audit(commands: Any) -> None:
    parser = add_command(
        commands,
        "audit",
        audit,
        "Looks for memorised training images among a run's samples and writes what it finds and the closest pairs as a "
        "picture, alone or under torchrun.",
        "cxr-vae audit runs/reference features=random",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="PNGs to look at (default: the evaluation's if drawn alike, else new ones)",
    )
    parser.add_argument(
        "--held-out", metavar="SPLIT", help="of images the model never saw (default: evaluate.real_split)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for what is found (default: RUN/evaluation)")
    add_overrides(parser)


def audit(arguments: argparse.Namespace) -> int:
    """`cxr-vae audit`."""
    from cxr_vae.audit.audit import audit as run_audit
    from cxr_vae.audit.record import RECORD, in_short
    from cxr_vae.console import outlive_full_log_disk
    from cxr_vae.run_dir import RunDir

    outlive_full_log_disk()
    run = RunDir(arguments.run)
    record = run_audit(
        run, arguments.overrides, images=arguments.images, held_out=arguments.held_out, out=arguments.out
    )
    if rank() == 0:
        print(f"\n{in_short(record)}\n\n{(arguments.out or run.evaluation) / RECORD}")
    return 0


def _add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        report,
        "Shows a run's losses, speed and figures, and writes them with its pictures as one HTML file; several runs, or "
        "a folder of them, stand beside each other.",
        "cxr-vae report runs/reference",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory, or a folder of them")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="(default: report.html in the one RUN or folder, else here)"
    )


def report(arguments: argparse.Namespace) -> int:
    """`cxr-vae report`."""
    from cxr_vae.report.command import report_runs

    text, page = report_runs(arguments.runs, arguments.out)
    print(f"{text}\n\n{page}")
    return 0


def _add_fetch_weights(commands: Any) -> None:
    parser = add_command(
        commands,
        "fetch-weights",
        fetch_weights,
        "Puts the Inception weights that FID, KID and Inception Score need into the cache, checked by their SHA-256.",
        "cxr-vae fetch-weights --from weights-inception-2015-12-05-6726825d.pth",
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a copy on disk (default: download)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds the server may stay silent")


def fetch_weights(arguments: argparse.Namespace) -> int:
    """`cxr-vae fetch-weights`."""
    from cxr_vae.evaluation.inception_weights import fetch_weights as run_fetching

    print(run_fetching(arguments.source, arguments.timeout))
    return 0


def _add_config(commands: Any) -> None:
    parser = add_command(
        commands,
        "config",
        config,
        "Shows every option with its value and meaning, after a configuration and options are applied.",
        "cxr-vae config configs/reference.yaml epochs=10",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file (without: the defaults)")
    add_overrides(parser)


def config(arguments: argparse.Namespace) -> int:
    """`cxr-vae config`."""
    from cxr_vae.config_file import describe_config, load_config

    path, overrides = arguments.config, arguments.overrides
    if path is not None and "=" in path:  # no file, only options
        path, overrides = None, [path, *overrides]
    print(describe_config(load_config(path, overrides)))
    return 0
