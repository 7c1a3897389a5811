"""What stands on the page of one run, section by section; a comparison is made of the same parts."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from cxr_vae.audit.samples import in_words
from cxr_vae.config import Config
from cxr_vae.config_file import flat
from cxr_vae.evaluation.features import NO_FID
from cxr_vae.inspection.findings import Finding
from cxr_vae.report.cells import Cell, Table, brief, describe, interval, number
from cxr_vae.report.figures import figure_tables, losses_table
from cxr_vae.report.history import history_tables
from cxr_vae.report.images import Picture, load_picture, montage
from cxr_vae.report.inputs import Facts, Inputs, Record, negative_elbo
from cxr_vae.report.plots import loss_curves, units_plot

NUM_SHOWN = 24
"""Generated and real images beside each other."""


@dataclass(frozen=True)
class Tile:
    """A number to be seen first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page; what it lacks is said in `missing`."""

    anchor: str
    title: str
    missing: str = ""
    note: str = ""
    findings: Sequence[Finding] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    texts: dict[str, str] = field(default_factory=dict)
    """Long texts by title, shown when asked for."""
    are_narrow: bool = False
    """Whether its tables go beside each other where there is room."""


def sections_of(run: Inputs) -> list[Section]:
    """The page of one run."""
    return [
        figures_section(run),
        training_section(run),
        images_section(run),
        record_section(run, "memorisation", "Nearest training images", run.audit, run.run.evaluation),
        latent_section(run),
        record_section(run, "data", "The data", run.inspection, run.shards),
        configuration_section(run),
        Section("history", "History", tables=history_tables(run)),
    ]


def tiles_of(run: Inputs) -> list[Tile]:
    """What one wants to know first."""
    tiles = []
    best = run.best_epoch
    if best:
        of = f"negative ELBO, nats an image, epoch {best['epoch']} of {len(run.epochs)}"
        tiles.append(Tile("Best test loss", f"{negative_elbo(best['test']):.1f}", of))
    if run.results:
        for name, figure in list(run.results.figures.items())[:1]:
            floor = "" if figure.floor is None else f"floor {brief(figure.floor, figure.floor_interval_95)}"
            spread = interval(figure.interval_95)
            note = "; ".join(part for part in (spread, floor) if part)
            value = brief(figure.value, figure.interval_95)
            tiles.append(Tile(describe(name)[0], value, note))
        for name, figure in (run.results.likelihood or {}).items():
            if name == "bits_per_dim":
                value = brief(figure.value, figure.interval_95)
                tiles.append(Tile("Bits per dimension", value, interval(figure.interval_95)))
    if run.audit and run.audit.findings:
        flagged = any(finding.level == "warning" for finding in run.audit.findings)
        tiles.append(
            Tile("Memorisation", "flagged" if flagged else "no sign", f"audit of {in_words(run.audit.samples)}")
        )
    size = run.hyperparameters.get("num_parameters")
    if isinstance(size, int):
        tiles.append(Tile("Parameters", number(size).text, f"{run.config.get('data.image_size', '?')} px"))
    return tiles


def warnings_for(run: Inputs, section: str) -> list[Finding]:
    """What should not be trusted there."""
    text = run.warnings.get(section)
    return [Finding(level="warning", text=text)] if text else []


def figures_section(run: Inputs) -> Section:
    """Figures with intervals and floors."""
    title = "Figures"
    if run.results is None:
        return Section("figures", title, missing=run.missing["figures"])
    findings = warnings_for(run, "figures")
    if run.results.features.get("network") == "random":
        findings.append(Finding(level="warning", text=NO_FID.removeprefix("WARNING: ")))
    return Section("figures", title, findings=findings, tables=figure_tables(run.results))


def training_section(run: Inputs) -> Section:
    """Losses over epochs, and in figures at the first, the best and the last one."""
    if not run.epochs:
        return Section("training", "Training", missing=run.missing["training"])
    return Section("training", "Training", pictures=loss_curves(run.epochs), tables=[losses_table(run)])


def newest(run: Inputs, kind: str, title: str, max_side: int | None = None) -> Picture | None:
    """The last sample or reconstruction grid."""
    paths = sorted((run.run.path / kind).glob("epoch_*.png"))
    if not paths:
        return None
    epoch = int(paths[-1].stem.removeprefix("epoch_"))
    more = {} if max_side is None else {"max_side": max_side}
    return load_picture(paths[-1], f"{title}, epoch {epoch}", f"Grid of {title.lower()} after epoch {epoch}", **more)


def images_section(run: Inputs) -> Section:
    """Grids of samples and reconstructions; generated images beside real ones."""
    found = [newest(run, "samples", "Samples"), newest(run, "reconstructions", "Reconstructions below their originals")]
    split = "" if run.results is None else f", {run.results.real.get('split', '?')} split"
    for folder, what in (("generated", "Generated images of the evaluation"), ("real", f"Real images{split}")):
        paths = sorted((run.run.evaluation / folder).glob("*.png"))[:NUM_SHOWN]
        found.append(montage(paths, what, f"The first {len(paths)}: {what.lower()}"))
    pictures = [picture for picture in found if picture]
    missing = "" if pictures else f"No pictures yet: `cxr-vae train {run.run.config}` draws them after an epoch."
    return Section("images", "Images", missing=missing, pictures=pictures)


def record_section(run: Inputs, anchor: str, title: str, record: Record | None, folder: Path) -> Section:
    """Tables, findings and pictures of a record."""
    if record is None:
        return Section(anchor, title, missing=run.missing[anchor])
    loaded = {one.title: load_picture(folder / one.file, one.title, one.title) for one in record.pictures}
    lost = [
        Finding(level="note", text=f"The picture “{name}” can't be read.") for name, one in loaded.items() if not one
    ]
    return Section(
        anchor,
        title,
        findings=sorted([*warnings_for(run, anchor), *record.findings, *lost], key=is_mild),
        pictures=[picture for picture in loaded.values() if picture],
        tables=[
            Table(one.title, one.headers, [[number(value) for value in row] for row in one.rows])
            for one in record.tables
        ],
    )


def is_mild(finding: Finding) -> bool:
    """Whether it is no warning: those come first."""
    return finding.level != "warning"


def latent_section(run: Inputs) -> Section:
    """Traversals and interpolations, and how many latent units are used."""
    paths = sorted((run.run.evaluation / "pictures").glob("*.png"))
    titles = [path.stem.replace("_", " ").capitalize() for path in paths]
    loaded = [load_picture(path, title, title) for path, title in zip(paths, titles, strict=True)]
    pictures = [picture for picture in loaded if picture]
    latent = run.results.latent if run.results else {}
    nats, active = latent.get("kl_nats_per_unit"), latent.get("active_units")
    note = ""
    if isinstance(active, int):
        note = f"{active} of {latent.get('num_units', '?')} latent units are active."
    if isinstance(nats, list) and nats:
        pictures.append(units_plot(nats, active if isinstance(active, int) else None))
    missing = "" if pictures or note else f"No latent pictures: `cxr-vae evaluate {run.run.path}` makes them."
    return Section("latent", "Latent space", missing=missing, note=note, pictures=pictures)


def configuration_section(run: Inputs) -> Section:
    """What differs from the defaults, hyperparameters and environment as tables; all options as text."""
    defaults = defaults_of(run.config.get("model.name"))
    changed = {key: value for key, value in run.config.items() if key not in defaults or value != defaults[key]}
    tables = [facts_table("Options that differ from the defaults", changed)]
    if run.hyperparameters:
        tables.append(facts_table("Hyperparameters", run.hyperparameters))
    environment = {key: value for key, value in run.environment.items() if key != "versions"}
    versions, command = run.environment.get("versions"), run.environment.get("command")
    if isinstance(command, list):
        environment["command"] = shlex.join(map(str, command))
    if environment:
        tables.append(facts_table("Environment", environment))
    if isinstance(versions, dict):
        tables.append(facts_table("Versions", versions))
    missing = "" if environment else "No environment.json: a run writes it when it starts."
    return Section(
        "configuration",
        "Configuration",
        missing=missing,
        tables=tables,
        texts={"All options (config.yaml)": run.run.config.read_text()},
        are_narrow=True,
    )


def defaults_of(architecture: object) -> Facts:
    """All options by dotted key; those that an architecture fills in as this one does."""
    try:
        config = Config.model_validate({"model": {"name": architecture}})
    except ValidationError:  # another version's
        config = Config()
    return dict(flat(config.model_dump(mode="json"))) | {"model.name": Config().model.name}


def facts_table(title: str, facts: dict[str, object]) -> Table:
    """Names and values."""
    rows = [[Cell(name, is_number=False), Cell(as_text(value), is_number=False)] for name, value in facts.items()]
    return Table(title, ["name", "value"], rows)


def as_text(value: object) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
