"""A run in a screenful: `cxr-vae report`, and what the pipeline prints at its end."""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from cxr_vae.evaluation.features import NO_FID
from cxr_vae.evaluation.image_sets import drawn_in_words
from cxr_vae.report.cells import Table
from cxr_vae.report.figures import fewer_note, figure_tables, losses_table, losses_tables
from cxr_vae.report.inputs import Inputs, Results
from cxr_vae.run_dir import RunDir


def report_of(run: Inputs) -> str:
    """Losses, speed and figures of a run as text, and which pictures to open."""
    parts = [f"{run.run.path}: {in_text(losses_table(run)) if run.epochs else 'no epoch is finished yet'}"]
    if run.results or run.run.results.is_file():
        parts += [figures_table(run.results) if run.results else run.missing["figures"]]
    where = run.run
    pictures = [where.curves, *newest_grids(where), where.evaluation / "generated", where.results]
    parts += ["Look at:\n" + "\n".join(f"  {path}" for path in pictures if path.exists())]
    return "\n\n".join(parts)


def report_comparing(runs: Sequence[Inputs]) -> str:
    """Losses of several runs as text, those that can be compared in one table."""
    return "\n\n".join([f"{len(runs)} runs, negative ELBO in nats an image", *map(in_text, losses_tables(runs))])


def in_text(table: Table) -> str:
    """A table for a terminal."""
    rows = [[cell.text for cell in row] for row in table.rows]
    note = f"\n{table.note}" if table.note else ""
    return f"{table.title}\n{tabulate(rows, table.headers, disable_numparse=True)}{note}"


def figures_table(results: Results) -> str:
    """Each figure with its interval and floor, the circumstances below."""
    network = str(results.features.get("network"))
    parts = []
    for table in figure_tables(results):
        rows = [
            [row[0].text.removesuffix(f", {network} features"), *(cell.text for cell in row[1:])] for row in table.rows
        ]
        parts.append(f"{table.title}\n{tabulate(rows, table.headers, disable_numparse=True)}")
    parts += [note for note in [fewer_note(results)] if note]
    if "num_units" in results.latent:
        parts.append(f"{results.latent['active_units']} of {results.latent['num_units']} latent units are active")
    drawn = drawn_in_words(results.generated)
    of = f" (prior: {drawn})" if drawn else ""
    what = f"{results.num_generated} generated images{of} against {results.num_real} real ones"
    parts.append(f"{what} ({results.real.get('split')} split), features: {network}")
    return "\n\n".join([*parts, NO_FID] if network == "random" else parts)


def newest_grids(run: RunDir) -> list[Path]:
    """The last sample grid and the last reconstruction grid."""
    return [
        path for kind in ("samples", "reconstructions") for path in sorted((run.path / kind).glob("epoch_*.png"))[-1:]
    ]
