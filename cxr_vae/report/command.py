"""`cxr-vae report`: which runs are meant, what is printed of them, and where their page goes."""

import os
from collections.abc import Sequence
from pathlib import Path

from cxr_vae.errors import UserError
from cxr_vae.report.inputs import Inputs, read_inputs
from cxr_vae.report.page import PAGE, write_report
from cxr_vae.report.summary import report_comparing, report_of
from cxr_vae.run_dir import RunDir


def report_runs(paths: Sequence[Path], out: Path | None = None) -> tuple[str, Path]:
    """The text to print and the page that was written; UserError where a path is no run and holds none."""
    page = out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
    if page.is_dir():
        raise UserError(f"--out {page} is a folder: name a file in it, such as {page / PAGE}")
    found = [run for path in paths for run in runs_at(path)]
    runs = list({run.run.path.resolve(): run for run in found}.values())  # each once
    for run, name in zip(runs, names_of([run.run.path for run in runs]), strict=True):
        run.name = name
    write_report(runs, page)
    return (report_of(runs[0]) if len(runs) == 1 else report_comparing(runs)), page


def runs_at(path: Path) -> list[Inputs]:
    """The run at a path or, where that is a folder of runs, those in it, best test loss first."""
    run = RunDir(path)
    if run.config.is_file() or not path.is_dir():
        return [read_inputs(run)]
    inside = [RunDir(folder) for folder in sorted(path.iterdir()) if folder.is_dir()]
    found = [read_inputs(run) for run in inside if run.config.is_file()]
    if not found:
        raise UserError(f"{path} is no run directory and holds none: name one that train wrote")
    return sorted(found, key=lambda run: run.best_test_loss)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: the names of their folders or, where two are equal, as much of the paths as differs."""
    whole = [path.resolve() for path in paths]
    if len({path.name for path in whole}) == len(whole):
        return [path.name for path in whole]
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) for path in whole]
