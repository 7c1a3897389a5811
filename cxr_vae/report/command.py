"""`cxr-vae report`: which runs are meant, what is printed of them, and where their page goes."""

import os
from collections.abc import Sequence
from pathlib import Path

from cxr_vae.errors import UserError
from cxr_vae.report.page import PAGE, write_report
from cxr_vae.report.summary import is_folder_of_runs, report, runs_in, runs_table
from cxr_vae.run_dir import RunDir


def report_runs(paths: Sequence[Path], out: Path | None = None) -> tuple[str, Path]:
    """The text to print and the page that was written; UserError where a path is no run and holds none."""
    given = [RunDir(path) for path in paths]
    runs = [run for one in given for run in (runs_in(one.path) if is_folder_of_runs(one) else [one])]
    runs = list({run.path.resolve(): run for run in runs}.values())  # each once
    page = out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))
    if page.is_dir():
        raise UserError(f"--out {page} is a folder: name a file in it, such as {page / PAGE}")
    write_report(list(zip(runs, names_of([run.path for run in runs]), strict=True)), page)
    if len(given) == 1:
        return report(given[0]), page
    return f"{len(runs)} runs, losses in nats an image\n\n{runs_table(runs)}", page


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: the names of their folders or, where two are equal, as much of the paths as differs."""
    whole = [path.resolve() for path in paths]
    if len({path.name for path in whole}) == len(whole):
        return [path.name for path in whole]
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) for path in whole]
