"""The `cxr-launch` command: the stages of `cxr-vae` as jobs, in Slurm's queue or on this machine."""

import argparse
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cxr_vae import __version__
from cxr_vae.commands.command_line import add_command, add_overrides, parse, run
from cxr_vae.errors import UserError
from cxr_vae.run_dir import RunDir
from launch import slurm_commands
from launch.logs import STAGES, show
from launch.records import Record, records_of
from launch.status import OVER, SeldomLook, look, runs_below, status_of, statuses, table

SUBMITTED = {
    "shard": ("Shards the folder of X-rays that a configuration names.", "data.source=chest_xray"),
    "train": ("Trains as a configuration says.", "train.epochs=10"),
    "prior": ("Fits the prior that a configuration names to its finished run.", "prior.name=gmm"),
    "evaluate": ("Evaluates the finished run of a configuration.", "evaluate.num_generated=1000"),
    "pipeline": (
        "Shards, trains, fits a prior if one is named, evaluates, reports; each if the one before succeeded.",
        "data.source=chest_xray",
    ),
}
"""What each does, and options of its example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = parse(build_parser(), argv)
    return run(arguments.command, arguments, "cxr-launch")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cxr-launch",
        description="The stages of cxr-vae as jobs, in Slurm's queue or on this machine.",
        epilog="Each command says more with --help. What was broken off goes on when it is started again.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, options) in SUBMITTED.items():
        example = f"cxr-launch {name} configs/reference.yaml {options} --cluster local"
        _add_submission(commands, name, text, example).set_defaults(command=submit, name=name)
    _add_sweep(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_cancel(commands)
    _add_doctor(commands)
    return parser


def _add_submission(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, submit, text, example)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file")
    add_overrides(parser)
    _add_where(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print what would be submitted")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="further options of sbatch (default: none)",
    )
    return parser


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "inline"),
        help="slurm: its queue; local: this machine, in the background; inline: this terminal, until it is done "
        "(default: slurm if a controller answers, else local)",
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="what the cluster gives: a file, or the name of one in configs/cluster (default: only what the "
        "configuration asks)",
    )


def submit(arguments: argparse.Namespace) -> int:
    """`cxr-launch shard`, `train`, `prior`, `evaluate` and `pipeline`."""
    from launch.submission import Submission

    return Submission.of(arguments).submit(arguments.name, dry_run=arguments.dry_run)


def _add_sweep(commands: Any) -> None:
    text = "Trains once for each combination of the values given, as a job array, each in a run directory of its own."
    example = "cxr-launch sweep configs/reference.yaml lr=1e-3,1e-4 latent_dim=64,128 run_dir=runs/sweep"
    parser = _add_submission(commands, "sweep", text, example)
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML file of lists of values by key")
    parser.set_defaults(command=sweep)


def sweep(arguments: argparse.Namespace) -> int:
    """`cxr-launch sweep`."""
    from launch.submission import sweep as submit_sweep

    return submit_sweep(arguments)


def _add_status(commands: Any) -> None:
    parser = add_command(
        commands,
        "status",
        status,
        "Shows how runs and their jobs stand, from the files of the runs and Slurm's queue; exits with 1 where one "
        "has failed.",
        "cxr-launch status runs",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="or a folder of runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="for programs")


def status(arguments: argparse.Namespace) -> int:
    """`cxr-launch status`."""
    found = statuses(runs_below(arguments.runs or [Path("runs")]))
    print(json.dumps([asdict(one) for one in found], indent=2) if arguments.json else table(found))
    return 1 if any(one.state in ("failed", "vanished") for one in found) else 0


def _add_logs(commands: Any) -> None:
    parser = add_command(
        commands, "logs", logs, "Shows what the jobs of a run print.", "cxr-launch logs runs/reference --follow"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--stage", choices=STAGES, help="(default: the one that printed last)")
    parser.add_argument("--follow", action="store_true", help="go on until the jobs of the run have ended")


def logs(arguments: argparse.Namespace) -> int:
    """`cxr-launch logs`."""
    run_dir, seldom = runs_below([arguments.run])[0], SeldomLook()

    def is_over() -> bool:
        return all(one.state in OVER for one in statuses([run_dir], seldom))

    for line in show(run_dir, arguments.stage, follow=arguments.follow, is_over=is_over):
        print(line, flush=True)
    return 0


def _add_cancel(commands: Any) -> None:
    parser = add_command(
        commands,
        "cancel",
        cancel,
        "Ends the jobs of runs for good. Training saves first, so that the same command goes on from there.",
        "cxr-launch cancel runs/reference",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of them")


def cancel(arguments: argparse.Namespace) -> int:
    """`cxr-launch cancel`."""
    living: list[tuple[RunDir, Record]] = []
    for run_dir in runs_below(arguments.runs):
        records = list(records_of(run_dir.jobs))
        views = look(records)
        living += [(run_dir, one) for one in records if status_of(run_dir, one, views).state not in OVER]
    if not living:
        print("nothing to cancel: no job of these runs is waiting or running")
        return 0
    for _, record in living:
        record.mark_cancelled()  # all of them, before the end of one starts or stops another
    trouble = end_jobs([record for _, record in living])
    for run_dir, record in living:
        print(f"{run_dir.path}: {record.stage} job {record.job} cancelled")
    if trouble is not None:
        raise UserError(f"{trouble}; the jobs won't start again, but may still run")
    return 0


def end_jobs(records: Sequence[Record]) -> str | None:
    """Tells them to leave; None, or what stands against it."""
    queued = [record.job for record in records if record.facts().get("cluster") == "slurm"]
    trouble = slurm_commands.cancel(queued) if queued else None
    trouble = trouble and f"Slurm says: {trouble}"
    for record in records:
        process, host = record.process(), record.facts().get("host")
        has_begun = any(attempt.ended is None for attempt in record.attempts[-1:])
        if process is not None and has_begun:  # else its turn hasn't come, and the mark is enough
            process.terminate()
        elif process is None and record.job not in queued and host != socket.gethostname():
            trouble = f"job {record.job} runs on {host}: cancel it there"
    return trouble


def _add_doctor(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        doctor,
        "Checks what a job needs, on this machine and on the cluster's nodes, and says what to do about what is amiss.",
        "cxr-launch doctor --profile gpu_modules --nodes 2",
    )
    from cxr_vae.commands.command_line import positive

    _add_where(parser)
    parser.add_argument("--nodes", type=positive, default=1, help="nodes to try, in a job of a minute")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where runs are to be, which all nodes must see"
    )


def doctor(arguments: argparse.Namespace) -> int:
    """`cxr-launch doctor`."""
    from launch.doctor import examine

    return examine(arguments.cluster, arguments.profile, arguments.nodes, arguments.folder)
