"""The `cxr-launch` command: the stages of `cxr-vae` as jobs, on this machine or on Slurm."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cxr_vae import __version__
from cxr_vae.command_line import add_command, add_overrides, parse, run
from cxr_vae.config import Config
from cxr_vae.config_file import dump_config, load_config
from cxr_vae.errors import UserError
from cxr_vae.files import write_atomically
from cxr_vae.run_dir import RunDir
from launch.clusters import Cluster, Local, Slurm
from launch.stages import Stage, evaluate_stage, shard_stage, train_stage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, that of the first stage that failed."""
    arguments = parse(build_parser(), argv)
    return run(launch, arguments, "cxr-launch")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cxr-launch",
        description="Starts the stages of cxr-vae as jobs, on this machine or on Slurm.",
        epilog="Each command says more with --help. A stage that was broken off goes on when it is started again.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    texts = {
        "train": "Trains as a configuration says.",
        "evaluate": "Evaluates the finished run of a configuration.",
        "pipeline": "Shards, trains, evaluates, in this order, and stops at the first stage that fails.",
    }
    for name, text in texts.items():
        _add_stage(commands, name, text)
    return parser


def _add_stage(commands: Any, name: str, text: str) -> None:
    example = f"cxr-launch {name} configs/reference.yaml train.epochs=10 --cluster local"
    parser = add_command(commands, name, launch, text, example)
    parser.set_defaults(name=name)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    add_overrides(parser)
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="local: this machine, at once")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands or sbatch scripts")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="further sbatch options, as partition=gpu"
    )


def launch(arguments: argparse.Namespace) -> int:
    """Checks the configuration, then starts (or describes) the jobs."""
    config = load_config(arguments.config, arguments.overrides)
    run_dir = RunDir(Path(config.run_dir))
    run_dir.check(config)  # before anything is queued
    resolved = run_dir.jobs / f"{arguments.name}-{time.strftime('%Y%m%d-%H%M%S')}.yaml"
    stages = stages_of(arguments.name, config, resolved)
    cluster = cluster_of(arguments, config, run_dir)
    if arguments.dry_run:
        print(cluster.describe(stages))
        return 0
    if arguments.name != "train" and config.evaluate.features == "inception":
        from cxr_vae.inception_weights import require_weights

        require_weights()  # a pipeline would find out only after the training
    resolved.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(resolved, dump_config(config))  # what is edited while a job waits doesn't change it
    code = cluster.run(stages)
    if code == 0 and arguments.name != "train" and arguments.cluster == "local":
        from cxr_vae.report import report

        print(f"\n── summary ──\n{report(run_dir)}")
    return code


def stages_of(name: str, config: Config, resolved: Path) -> list[Stage]:
    """The stages of a command; sharding is left out where there is nothing to shard and shards are there."""
    if name == "train":
        return [train_stage(config, resolved)]
    if name == "evaluate":
        return [evaluate_stage(config)]
    sharding = shard_stage(config)
    return [*([sharding] if sharding else []), train_stage(config, resolved), evaluate_stage(config)]


def cluster_of(arguments: argparse.Namespace, config: Config, run_dir: RunDir) -> Cluster:
    """Where to run, as the command line says."""
    sbatch = dict(item.partition("=")[::2] for item in arguments.sbatch)
    if not all(sbatch.values()):
        raise UserError("--sbatch takes KEY=VALUE, as in --sbatch partition=gpu")
    if arguments.cluster == "local":
        return Local(run_dir.jobs, config.resources)
    return Slurm(run_dir.jobs, config.resources, sbatch)
