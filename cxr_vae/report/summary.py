"""A run in a screenful: `cxr-vae report`, and what the pipeline prints at its end."""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from cxr_vae.errors import UserError
from cxr_vae.evaluation.features import NO_FID
from cxr_vae.report.figures import figure_tables, prior_in_words
from cxr_vae.report.inputs import Results, read_checked
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_epochs, read_records


def report(run: RunDir) -> str:
    """Losses, speed and figures of a run as text, and which pictures to open; of a folder of runs, their table."""
    if is_folder_of_runs(run):
        return compare_runs(run.path)
    run.saved_config()
    parts = [losses_table(run)]
    if run.results.is_file():
        results, sentence = read_checked(run.results, Results, "evaluate again")
        parts += [figures_table(results) if results else sentence]
    pictures = [run.curves, *newest_grids(run), run.evaluation / "generated", run.results]
    parts += ["Look at:\n" + "\n".join(f"  {path}" for path in pictures if path.exists())]
    return "\n\n".join(parts)


def is_folder_of_runs(run: RunDir) -> bool:
    """Whether this is no run directory, but may hold some."""
    return run.path.is_dir() and not run.config.is_file()


def runs_in(folder: Path) -> list[RunDir]:
    """The runs in a folder, best test loss first; UserError where there are none."""
    found = [run for path in sorted(folder.iterdir()) if path.is_dir() and (run := RunDir(path)).config.is_file()]
    if not found:
        raise UserError(f"{folder} is no run directory and holds none: name one that train wrote")
    return sorted(found, key=best_test_loss)


def best_test_loss(run: RunDir) -> float:
    """In nats an image; infinite before the first epoch."""
    return min((epoch["test"]["loss_nats"] for epoch in read_epochs(run)), default=float("inf"))


def compare_runs(folder: Path) -> str:
    """The runs in a folder, best test loss first, as text; UserError where there are none."""
    runs = runs_in(folder)
    return f"{folder}: {len(runs)} runs, losses in nats an image\n\n{runs_table(runs)}"


def runs_table(runs: Sequence[RunDir]) -> str:
    """Losses of several runs."""
    rows = []
    for run in runs:
        epochs = read_epochs(run)
        losses = [epoch["test"]["loss_nats"] for epoch in epochs]
        best = min(range(len(losses)), key=losses.__getitem__, default=None)
        found = (None, None, None) if best is None else (losses[best], epochs[best]["epoch"], losses[-1])
        rows.append([run.path.name, "yes" if run.weights.is_file() else "no", len(epochs), *found])
    headers = ["run", "finished", "epochs", "best test loss", "at epoch", "last test loss"]
    return tabulate(rows, headers, floatfmt=("", "", "d", ".2f", "d", ".2f"), missingval="-")


def losses_table(run: RunDir) -> str:
    """First and last epoch, train and test."""
    epochs = read_epochs(run)
    if not epochs:
        return f"{run.path}: no epoch is finished yet"
    rows = []
    for record in dict.fromkeys((0, len(epochs) - 1)):
        for split in ("train", "test"):
            losses = epochs[record][split]
            rows.append([epochs[record]["epoch"], split, *losses.values()])
    speeds = [record["images_per_s"] for record in read_records(run.speed)]
    speed = f"; median {sorted(speeds)[len(speeds) // 2]:.0f} images/s" if speeds else ""
    headers = ["epoch", "split", "loss", "reconstruction", "KL", "bits/dim"]
    table = tabulate(rows, headers, floatfmt=("d", "", ".1f", ".1f", ".1f", ".4f"))
    return f"{run.path}: training, nats an image{speed}\n\n{table}"


def figures_table(results: Results) -> str:
    """Each figure with its interval and floor, the circumstances below."""
    network = str(results.features.get("network"))
    parts = []
    for table in figure_tables(results):
        rows = [
            [row[0].text.removesuffix(f", {network} features"), *(cell.text for cell in row[1:])] for row in table.rows
        ]
        parts.append(f"{table.title}\n{tabulate(rows, table.headers, disable_numparse=True)}")
    if "num_units" in results.latent:
        parts.append(f"{results.latent['active_units']} of {results.latent['num_units']} latent units are active")
    drawn = prior_in_words(results)
    of = f" (prior: {drawn})" if drawn else ""
    what = f"{results.num_generated} generated images{of} against {results.num_real} real ones"
    parts.append(f"{what} ({results.real.get('split')} split), features: {network}")
    return "\n\n".join([*parts, NO_FID] if network == "random" else parts)


def newest_grids(run: RunDir) -> list[Path]:
    """The last sample grid and the last reconstruction grid."""
    return [
        path for kind in ("samples", "reconstructions") for path in sorted((run.path / kind).glob("epoch_*.png"))[-1:]
    ]
