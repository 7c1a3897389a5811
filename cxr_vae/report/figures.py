"""Figures as tables: those of one run with intervals and floors, those of several runs beside each other.

Only figures that can be compared stand in one table: the same feature network, weights, dtype, resize, numbers of
images, splits, content of the splits and, of losses, likelihood of the pixels. Runs of which something differs get a
table of their own, with the reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cxr_vae.evaluation.image_sets import drawn_in_words
from cxr_vae.report.inputs import FigureRecord, Inputs, Results, negative_elbo

LOWER, HIGHER = "lower is better", "higher is better"

KNOWN = {
    "fid": ("FID", LOWER),
    "fid_infinity": ("FID∞", LOWER),
    "kid": ("KID", LOWER),
    "inception_score": ("Inception Score", ""),
    "frechet": ("Fréchet distance", LOWER),
    "frechet_infinity": ("Fréchet distance, extrapolated", LOWER),
    "kernel": ("Kernel distance", LOWER),
    "score": ("Score of classes", ""),
    "precision": ("Precision", HIGHER),
    "recall": ("Recall", HIGHER),
    "density": ("Density", HIGHER),
    "coverage": ("Coverage", HIGHER),
    "psnr_db": ("PSNR, dB", HIGHER),
    "ssim": ("SSIM", HIGHER),
    "negative_elbo_nats": ("Negative ELBO, nats an image", LOWER),
    "reconstruction_nats": ("Reconstruction, nats an image", LOWER),
    "kl_nats": ("KL, nats an image", ""),
    "importance_bound_nats": ("Importance-weighted bound, nats an image", LOWER),
    "bits_per_dim": ("Bits per dimension", LOWER),
    "active_units": ("Active latent units", ""),
}
"""Titles, and which way is better where one is."""


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, and smaller text below it."""

    text: str
    note: str = ""
    is_number: bool = True
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table on a page; the first cell of a row is its heading."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]
    note: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """Its circumstances, by name."""


Group = tuple[list[Inputs], dict[str, str]]
"""Runs that may stand in one table, and the circumstances they share."""


def describe(name: str) -> tuple[str, str]:
    """A figure's title and which way is better; `frechet_random` is `Fréchet distance, random features`."""
    known = max((one for one in KNOWN if name == one or name.startswith(f"{one}_")), key=len, default=None)
    if known is None:
        return name.replace("_", " "), ""
    title, better = KNOWN[known]
    rest = name[len(known) + 1 :]
    return f"{title}{f', {rest} features' if rest else ''}", better


def number(value: float | int | bool | str | None) -> Cell:
    """A number as text, a text as it is, nothing as a dash."""
    if value is None:
        return Cell("–", is_number=False)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", is_number=False)
    if isinstance(value, str):
        return Cell(value, is_number=False)
    return Cell(f"{value:,}".replace(",", " ") if isinstance(value, int) else brief(value))


def brief(value: float, low_high: tuple[float, float] | None = None) -> str:
    """A number with the digits that count: two of its interval's half, four where there is none."""
    half = 0.0 if low_high is None else (low_high[1] - low_high[0]) / 2
    if not math.isfinite(value) or not math.isfinite(half):
        return str(value)
    if half <= 0:
        text = f"{value:.4g}"
        text = f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text
    elif max(abs(value), half) < 1e-3:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        text = f"{value:.{max(0, 1 - math.floor(math.log10(half)))}f}"
    return text.replace("-", "−")


def interval(low_high: tuple[float, float] | None) -> str:
    """`3.1 … 3.5`; empty where there is none."""
    return "" if low_high is None else f"{brief(low_high[0], low_high)} … {brief(low_high[1], low_high)}"


def measured(value: float | None, low_high: tuple[float, float] | None) -> Cell:
    """A figure, rounded as its interval asks for."""
    return number(None) if value is None else Cell(brief(value, low_high))


def words(facts: Mapping[str, Any]) -> dict[str, str]:
    """Circumstances as texts, without those that are not known."""
    return {name: str(value) for name, value in facts.items() if value is not None}


def circumstances(results: Results) -> dict[str, str]:
    """All that has to be equal for two figures of samples to be compared."""
    evaluate = results.request.get("evaluate", {})
    return words(
        {
            "feature network": results.features.get("network"),
            "its weights, SHA-256": results.features.get("weights_sha256"),
            "its code, SHA-256": results.features.get("code_sha256"),
            "dtype": results.features.get("dtype"),
            "resize": results.features.get("resize"),
            "image size": results.image_size,
            "generated images": results.num_generated,
            "real images": results.num_real,
            "real split": results.real.get("split"),
            "its index, SHA-256": results.real.get("index_sha256"),
            "which of its images, SHA-256": results.real.get("rows_sha256"),
            "floor images": results.num_floor,
            "floor split": results.floor.get("split"),
            "its index, SHA-256 (floor)": results.floor.get("index_sha256"),
            "parts of the score": evaluate.get("is_splits"),
            "images of a kernel distance's subset": evaluate.get("kid_subset_size"),
        }
    )


def of_samples(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Figures of generated images."""
    return results.figures, circumstances(results)


def of_reconstructions(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Figures of reconstructed real images; generated ones and the floor have no part in them."""
    if results.reconstructions is None:
        return {}, {}
    facts = circumstances(results) | words({"reconstructed images": results.reconstructions.num})
    others = ("generated", "floor", "(floor)", "parts", "real images")
    return results.reconstructions.figures, {
        name: fact for name, fact in facts.items() if not name.startswith(others) and not name.endswith("(floor)")
    }


def of_likelihood(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Bounds on the likelihood of real images; no feature network has a part in them."""
    facts = circumstances(results)
    kept = ("image size", "real images", "real split", "its index, SHA-256", "which of its images, SHA-256")
    own = {
        "pixel likelihood": results.pixel_likelihood,
        "latents of the importance-weighted bound": results.latent.get("importance_samples"),
    }
    return results.likelihood or {}, {name: facts[name] for name in kept if name in facts} | words(own)


Kind = Callable[[Results], tuple[Mapping[str, FigureRecord], dict[str, str]]]

KINDS: dict[str, Kind] = {
    "Samples": of_samples,
    "Reconstructions of real images": of_reconstructions,
    "Likelihood": of_likelihood,
}


def figure_tables(results: Results) -> list[Table]:
    """The tables of one run."""
    tables = []
    for title, kind in KINDS.items():
        figures, facts = kind(results)
        if not figures:
            continue
        has_floor = any(figure.floor is not None for figure in figures.values())
        headers = ["figure", "value", "95 % interval", *(["floor", "its 95 % interval"] if has_floor else [])]
        rows = []
        for name, figure in figures.items():
            called, better = describe(name)
            row = [Cell(called, better, is_number=False), measured(figure.value, figure.interval_95)]
            row.append(Cell(interval(figure.interval_95)))
            if has_floor:
                row += [measured(figure.floor, figure.floor_interval_95), Cell(interval(figure.floor_interval_95))]
            rows.append(row)
        # No circumstance that has to be equal: priors are there to be compared.
        drawn = drawn_in_words(results.generated) if kind is of_samples else ""
        all_facts = ({"prior": drawn} if drawn else {}) | facts
        notes = (floor_note(results) if has_floor else "", fewer_note(results, kind))
        tables.append(Table(title, headers, rows, " ".join(note for note in notes if note), all_facts))
    return tables


def floor_note(results: Results) -> str:
    """What the floor is."""
    meaning = results.floor.get("meaning")
    return f"Floor: {meaning}. Interval: {results.interval}." if meaning and results.interval else ""


def fewer_note(results: Results, kind: Kind = of_samples) -> str:
    """Which figures are of fewer images than those they stand by."""
    said = []
    wanted, there = results.num_generated, results.num_floor
    if kind is of_samples and wanted and there and there < wanted:
        said.append(
            f"The floor is of {number(there).text} images, all that the {results.floor.get('split')} split has, not of "
            f"{number(wanted).text}: with fewer images a Fréchet distance is larger."
        )
    nums = {"generated": wanted, "real": results.num_real}
    fewer = [most for name, most in results.num_pairs.items() if most < (nums.get(name) or 0)]
    if kind is not of_likelihood and fewer:
        said.append(
            "Precision, recall, density, coverage and the interval of the kernel distance are of at most "
            f"{number(max(fewer)).text} images of each set."
        )
    return " ".join(said)


def grouped(runs: Sequence[Inputs], facts_of: Callable[[Inputs], dict[str, str]]) -> list[Group]:
    """Runs by their circumstances, in the order in which these first appear."""
    groups: list[Group] = []
    for run in runs:
        facts = facts_of(run)
        for members, shared in groups:
            if shared == facts:
                members.append(run)
                break
        else:
            groups.append(([run], facts))
    return groups


def why_apart(facts: Mapping[str, str], first: Mapping[str, str]) -> str:
    """What keeps a group from being compared with the first: `feature network random, not inception`."""
    names = [name for name in {**first, **facts} if facts.get(name) != first.get(name)]
    return "; ".join(f"{name} {short(facts.get(name))}, not {short(first.get(name))}" for name in names)


def short(fact: str | None) -> str:
    """A fact in a sentence: the first digits of a hash, `unknown` for None."""
    if fact is None:
        return "unknown"
    return f"{fact[:12]}…" if len(fact) == 64 and fact.isalnum() else fact


def comparison_tables(runs: Sequence[Inputs]) -> list[Table]:
    """Runs as columns, one table for each kind of figures and each group of runs that can be compared."""
    evaluated = [run for run in runs if run.results is not None]
    tables = []
    for title, kind in KINDS.items():

        def facts_of(run: Inputs, kind: Kind = kind) -> dict[str, str]:
            assert run.results is not None
            return kind(run.results)[1]

        having = [run for run in evaluated if run.results is not None and kind(run.results)[0]]
        groups = grouped(having, facts_of)
        for place, (members, facts) in enumerate(groups):
            name = title if len(groups) == 1 else f"{title}, group {place + 1} of {len(groups)}"
            apart = why_apart(facts, groups[0][1]) if place else ""
            notes = [f"Not to be compared with group 1: {apart}." if apart else ""]
            notes += [fewer_note(members[0].results, kind) if members[0].results else ""]  # as of the others
            tables.append(compared(name, members, kind, facts, " ".join(note for note in notes if note)))
    return tables


def compared(title: str, runs: Sequence[Inputs], kind: Kind, facts: dict[str, str], note: str) -> Table:
    """One table of runs that can be compared."""
    found = [kind(run.results)[0] for run in runs if run.results is not None]
    names = list(dict.fromkeys(name for figures in found for name in figures))
    has_floor = any(figure.floor is not None for figures in found for figure in figures.values())
    priors = [drawn_in_words(run.results.generated) for run in runs if run.results is not None]
    rows = []
    if kind is of_samples and any(priors):
        cells = [Cell(text or "–", is_number=False) for text in ["prior", *(["–"] if has_floor else []), *priors]]
        rows.append(cells)
    for name in names:
        called, better = describe(name)
        row = [Cell(called, better, is_number=False)]
        records = [figures.get(name) for figures in found]
        if has_floor:
            floor = next((record for record in records if record and record.floor is not None), None)
            row.append(
                number(floor and floor.floor) if floor is None else _with_note(floor.floor, floor.floor_interval_95)
            )
        best = best_of([None if record is None else record.value for record in records], better)
        row += [
            number(None) if record is None else _with_note(record.value, record.interval_95, place == best)
            for place, record in enumerate(records)
        ]
        rows.append(row)
    headers = ["figure", *(["floor"] if has_floor else []), *(run.name for run in runs)]
    return Table(title, headers, rows, note, facts)


def _with_note(value: float | None, low_high: tuple[float, float] | None, is_best: bool = False) -> Cell:
    return replace(measured(value, low_high), note=interval(low_high), is_best=is_best)


def best_of(values: Sequence[float | None], better: str) -> int | None:
    """Which value is best; None where that can't be said or there is one only."""
    known = [place for place, value in enumerate(values) if value is not None and value == value]
    if len(known) < 2 or not better:
        return None
    choose = min if better == LOWER else max
    return choose(known, key=lambda place: values[place] or 0.0)


def losses_circumstances(run: Inputs) -> dict[str, str]:
    """All that has to be equal for two test losses to be compared."""
    split = str(run.config.get("data.test_split", "test"))
    return words(
        {
            "image size": run.config.get("data.image_size"),
            "test split": split,
            "its index, SHA-256": run.index_hashes.get(split),
            "pixel likelihood": run.config.get("objective.likelihood"),
            "KL weight": run.config.get("objective.kl_weight"),
        }
    )


def losses_tables(runs: Sequence[Inputs]) -> list[Table]:
    """Test losses (negative ELBOs) of several runs, one table for each group that can be compared."""
    groups = grouped(runs, losses_circumstances)
    headers = ["run", "finished", "epochs", "best test loss", "at epoch", "last test loss", "bits/dim at the best"]
    tables = []
    for place, (members, facts) in enumerate(groups):
        title = "Runs" if len(groups) == 1 else f"Runs, group {place + 1} of {len(groups)}"
        note = f"Not to be compared with group 1: {why_apart(facts, groups[0][1])}." if place else ""
        bests = [run.best_epoch for run in members]
        winner = best_of([None if best is None else negative_elbo(best["test"]) for best in bests], LOWER)
        rows = []
        for number_, (run, best) in enumerate(zip(members, bests, strict=True)):
            finished = "yes" if run.weights_sha256 else "no"
            row = [Cell(run.name, is_number=False), Cell(finished, is_number=False), number(len(run.epochs))]
            if best is None:
                row += [number(None)] * 4
            else:
                loss = Cell(f"{negative_elbo(best['test']):.2f}", is_best=number_ == winner)
                last = Cell(f"{negative_elbo(run.epochs[-1]['test']):.2f}")
                row += [loss, number(best["epoch"]), last, Cell(f"{best['test']['bits_per_dim']:.4f}")]
            rows.append(row)
        tables.append(Table(title, headers, rows, note, facts))
    return tables
