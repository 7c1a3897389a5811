"""What stands on the page of several runs: only what can be compared in one table or plot."""

from collections.abc import Sequence

from cxr_vae.audit.samples import in_words
from cxr_vae.evaluation.features import NO_FID
from cxr_vae.inspection.findings import Finding
from cxr_vae.report.cells import Cell, Table
from cxr_vae.report.comparable import grouped, losses_circumstances
from cxr_vae.report.figures import comparison_tables, losses_tables
from cxr_vae.report.inputs import Inputs
from cxr_vae.report.plots import compared_curves
from cxr_vae.report.sections import Section, as_text, is_mild, newest

GRIDS = {"samples": "Samples", "reconstructions": "Reconstructions below their originals"}
MOST_COMPARED = 12
"""Runs whose curves and pictures a comparison shows; its tables show all."""
SMALL_SIDE = 700
"""Pixels along a picture of a comparison."""


def sections_comparing(runs: Sequence[Inputs]) -> list[Section]:
    """The page of several runs."""
    lacking = [f"{run.name}: {run.missing['figures']}" for run in runs if run.results is None]
    warned = [
        Finding(level="warning", text=f"{run.name}: {text}")
        for run in runs
        for text in dict.fromkeys(run.warnings.values())
    ]
    if any(run.results and run.results.features.get("network") == "random" for run in runs):
        warned.append(Finding(level="warning", text=NO_FID.removeprefix("WARNING: ")))
    figures = comparison_tables(runs)
    return [
        Section("runs", "Runs", tables=losses_tables(runs), note="Negative ELBO of the test split, in nats an image."),
        Section(
            "figures",
            "Figures",
            missing="" if figures else "None of these runs has figures.",
            note="Bold is the best of a row. Where intervals overlap it need not be better." if figures else "",
            findings=[*warned, *(Finding(level="note", text=text) for text in lacking)],
            tables=figures,
        ),
        *curves_sections(runs),
        *(pictures_section(runs, kind, title) for kind, title in GRIDS.items()),
        audits_section(runs),
        Section("configuration", "What was set differently", tables=[differing_options(runs)]),
    ]


def curves_sections(runs: Sequence[Inputs]) -> list[Section]:
    """Test losses over epochs, those that can be compared in one plot."""
    trained = [run for run in runs if run.epochs][:MOST_COMPARED]
    groups = grouped(trained, losses_circumstances)
    if not groups:
        return [Section("training", "Training", missing="No epoch is finished yet in any of these runs.")]
    sections = []
    for place, (members, _) in enumerate(groups):
        title = "Training" if len(groups) == 1 else f"Training, group {place + 1} of {len(groups)}"
        anchor = f"training-{place + 1}" if place else "training"
        pictures = compared_curves({run.name: run.epochs for run in members})
        sections.append(Section(anchor, title, note=shown_note(runs), pictures=pictures))
    return sections


def shown_note(runs: Sequence[Inputs]) -> str:
    """That not all runs are shown, if so."""
    return f"The first {MOST_COMPARED} of {len(runs)} runs." if len(runs) > MOST_COMPARED else ""


def pictures_section(runs: Sequence[Inputs], kind: str, title: str) -> Section:
    """The last grid of each run."""
    found = [newest(run, kind, f"{run.name}: {title.lower()}", SMALL_SIDE) for run in runs[:MOST_COMPARED]]
    pictures = [picture for picture in found if picture]
    missing = "" if pictures else "None of these runs has drawn any yet."
    return Section(kind, title, missing=missing, note=shown_note(runs), pictures=pictures)


def audits_section(runs: Sequence[Inputs]) -> Section:
    """What the memorisation audit says of each run."""
    rows = []
    for run in runs:
        found = sorted(run.audit.findings, key=is_mild) if run.audit else []
        texts = [one.text for one in found] if run.audit else [run.missing["memorisation"]]
        level = found[0].level if found else "not audited"
        of = in_words(run.audit.samples) if run.audit else "–"
        cells = (run.name, level, of, texts[0] if texts else "–")
        rows.append([Cell(text, is_number=False) for text in cells])
    return Section(
        "memorisation", "Nearest training images", tables=[Table("Audits", ["run", "level", "of", "it says"], rows)]
    )


def differing_options(runs: Sequence[Inputs]) -> Table:
    """Options as rows, runs as columns; without those all agree on."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key != "run_dir"))
    rows = []
    for key in keys:
        values = [as_text(run.config[key]) if key in run.config else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append([Cell(key, is_number=False), *(Cell(value) for value in values)])
    note = "" if rows else "Nothing: their configurations are equal."
    return Table("Options that differ", ["option", *(run.name for run in runs)], rows, note)
