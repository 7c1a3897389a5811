"""Figures as tables: those of one run with intervals and floors, those of several runs beside each other.

Only figures that can be compared stand in one table: the same feature network, weights, dtype, resize, numbers of
images, splits, content of the splits and, of losses, likelihood of the pixels. Runs of which something differs get a
table of their own, with the reason.
"""

from collections.abc import Sequence
from dataclasses import replace

from cxr_vae.evaluation.image_sets import drawn_in_words
from cxr_vae.report.cells import LOWER, Cell, Table, describe, interval, measured, number
from cxr_vae.report.comparable import KINDS, Kind, grouped, losses_circumstances, of_likelihood, of_samples, why_apart
from cxr_vae.report.inputs import Inputs, Results, negative_elbo, read_optional


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


def losses_table(run: Inputs) -> Table:
    """Losses of one run, which has epochs, at the first, the best and the last one."""
    rows = []
    named = {"first": run.epochs[0], "best test loss": run.best_epoch, "last": run.epochs[-1]}
    for epoch in {one["epoch"]: one for one in named.values() if one}.values():
        what = ", ".join(name for name, one in named.items() if one is epoch)
        for split in ("train", "test"):
            losses = epoch[split]
            nats = (negative_elbo(losses), losses["reconstruction_nats"], losses["kl_nats"])
            cells = [Cell(f"{value:.2f}") for value in nats]
            label = Cell(f"{epoch['epoch']}, {split}", what, is_number=False)
            rows.append([label, *cells, Cell(f"{losses['bits_per_dim']:.4f}")])
    headers = ["epoch", "negative ELBO", "reconstruction", "KL", "bits/dim"]
    speeds = sorted(speed["images_per_s"] for speed in run.speeds)
    note = f"Median speed: {speeds[len(speeds) // 2]:.0f} images/s." if speeds else ""
    if line := read_optional(run.run.efficiency).get("in_a_line"):
        note += f" The last attempt with all it did: {line}."
    return Table("Losses, nats an image", headers, rows, note)
