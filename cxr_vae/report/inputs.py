"""What a report is made from: the files of a run, checked, a sentence in place of each that is missing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cxr_vae.checkpoints.manifest import MANIFEST as CHECKPOINT_MANIFEST
from cxr_vae.checkpoints.manifest import published
from cxr_vae.config_file import flat, read_tree
from cxr_vae.data.index import MANIFEST
from cxr_vae.errors import UserError
from cxr_vae.files import read_json, sha256_of
from cxr_vae.inspection.findings import Finding, Table
from cxr_vae.run_dir import RunDir
from cxr_vae.training.run_log import read_epochs, read_records

AUDIT, INSPECTION = "memorisation.json", "inspection.json"

Facts = dict[str, Any]


class _Read(BaseModel):
    """What is read from a file: types are checked, what we don't know is kept, but of tables and findings."""

    model_config = ConfigDict(extra="allow", frozen=True)


class FigureRecord(_Read):
    """A figure; a floor where it has one."""

    value: float
    interval_95: tuple[float, float] | None = None
    floor: float | None = None
    floor_interval_95: tuple[float, float] | None = None


class Reconstructions(_Read):
    """Figures of reconstructed test images."""

    figures: dict[str, FigureRecord]
    num: int | None = None


class Results(_Read):
    """evaluation_results.json."""

    figures: dict[str, FigureRecord]
    reconstructions: Reconstructions | None = None
    likelihood: dict[str, FigureRecord] | None = None
    latent: Facts = {}
    num_generated: int | None = None
    num_real: int | None = None
    num_floor: int | None = None
    num_pairs: dict[str, int] = {}
    """Images of each set that figures of all pairs look at."""
    generated: Facts = {}
    real: Facts = {}
    floor: Facts = {}
    features: Facts = {}
    image_size: int | None = None
    pixel_likelihood: str | None = None
    interval: str = ""
    versions: Facts = {}
    request: Facts = {}


class RecordPicture(_Read):
    """A picture of a record, relative to the record's file."""

    title: str
    file: str


class Record(_Read):
    """What every record has that can be shown: memorisation.json and inspection.json."""

    tables: list[Table] = []
    findings: list[Finding] = []
    pictures: list[RecordPicture] = []
    samples: Facts = {}
    """What an audit looked at."""
    index_hashes: dict[str, str] = {}
    """Of the shards that were inspected, by split."""


T = TypeVar("T", bound=BaseModel)


@dataclass
class Inputs:
    """Of one run. Where something is None, `missing` has the sentence that says why and what to do."""

    run: RunDir
    name: str
    config: Facts
    """By dotted key."""
    environment: Facts
    hyperparameters: Facts
    epochs: list[Facts]
    speeds: list[Facts]
    index_hashes: dict[str, str]
    """Of the splits the run was trained and tested on; empty where no checkpoint is left to tell."""
    weights_sha256: str | None
    shards: Path
    results: Results | None = None
    audit: Record | None = None
    inspection: Record | None = None
    missing: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    """By section: what is there but should not be trusted."""

    @property
    def best_epoch(self) -> Facts | None:
        """The epoch of the lowest test loss, as checkpoints are compared: the negative ELBO."""
        return min(self.epochs, key=lambda epoch: negative_elbo(epoch["test"]), default=None)

    @property
    def best_test_loss(self) -> float:
        """In nats an image; infinite before the first epoch."""
        best = self.best_epoch
        return float("inf") if best is None else negative_elbo(best["test"])


def negative_elbo(losses: Facts) -> float:
    """In nats an image. A record's `loss_nats` has the KL weight of its step: after a warm-up it would be another's."""
    return float(losses["reconstruction_nats"] + losses["kl_nats"])


def read_inputs(run: RunDir) -> Inputs:
    """All that is known of a run; UserError where it is none of a model or its configuration can't be read."""
    config, epochs = read_config(run), read_epochs(run)
    if is_of_prior(run, epochs):
        raise UserError(f"{run.path} is the training of a prior, which has no report: name the run the prior is of")
    checkpoints = published(run.checkpoints)
    inputs = Inputs(
        run,
        run.path.resolve().name,
        config,
        read_optional(run.path / "environment.json"),
        read_optional(run.path / "hyperparameters.json"),
        epochs,
        read_records(run.speed),
        read_optional(checkpoints[0] / CHECKPOINT_MANIFEST).get("index_hashes", {}) if checkpoints else {},
        sha256_of(run.weights) if run.weights.is_file() else None,
        Path(str(config.get("data.shards", "shards"))),
    )
    if not inputs.epochs:
        inputs.missing["training"] = f"No epoch is finished yet: `cxr-vae train {run.config}` goes on."
    _read_results(inputs)
    _read_audit(inputs)
    _read_inspection(inputs)
    return inputs


def is_of_prior(run: RunDir, epochs: Sequence[Facts]) -> bool:
    """Whether this is where a prior was trained, a run directory in that of a model, or a copy of such a one."""
    folder = run.path.resolve().parent
    is_inside = folder.name == "priors" and RunDir(folder.parent).config.is_file()
    return is_inside or any("kl_nats" not in epoch["test"] for epoch in epochs)


def read_config(run: RunDir) -> Facts:
    """The configuration by dotted key, as it was saved, also by another version."""
    if not run.config.is_file():
        raise UserError(f"{run.path} is not a run directory (it has no {run.config.name}): name one train wrote")
    return dict(flat(read_tree(run.config)))


def read_optional(path: Path) -> Facts:
    """A JSON object; empty where there is none."""
    try:
        content = read_json(path, hint="")
    except (UserError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def read_checked(path: Path, kind: type[T], remedy: str) -> tuple[T | None, str]:
    """The file as `kind`, or None and the sentence that says what is wrong with it and what to do."""
    if not path.is_file():
        return None, f"{path.name} is missing: {remedy}"
    try:
        return kind.model_validate(read_json(path, hint=remedy)), ""
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        return None, f"{path.name} is not what this version writes ({where or 'not an object'}): {remedy}"
    except (UserError, OSError):
        return None, f"{path.name} is damaged or can't be read: {remedy}"


def _read_results(inputs: Inputs) -> None:
    remedy = f"`cxr-vae evaluate {inputs.run.path}` makes it."
    inputs.results, sentence = read_checked(inputs.run.results, Results, remedy)
    if inputs.results is None:
        inputs.missing["figures"] = f"No figures: {sentence}"
        return
    if inputs.results.pixel_likelihood is None:  # older records don't say
        said = {"pixel_likelihood": inputs.config.get("objective.likelihood")}
        inputs.results = inputs.results.model_copy(update=said)
    _note_other_weights(inputs, "figures", inputs.results.request.get("run_weights_sha256"), "evaluate")


def _read_audit(inputs: Inputs) -> None:
    remedy = f"`cxr-vae audit {inputs.run.path}` makes it."
    inputs.audit, sentence = read_checked(inputs.run.evaluation / AUDIT, Record, remedy)
    if inputs.audit is None:
        inputs.missing["memorisation"] = f"No memorisation audit: {sentence}"
        return
    _note_other_weights(inputs, "memorisation", inputs.audit.samples.get("weights_sha256"), "audit")


def _note_other_weights(inputs: Inputs, section: str, sha256: Any, command: str) -> None:
    if sha256 and inputs.weights_sha256 and sha256 != inputs.weights_sha256:
        inputs.warnings[section] = (
            f"This is of other weights than the run has now: run `cxr-vae {command} {inputs.run.path}` again."
        )


def _read_inspection(inputs: Inputs) -> None:
    remedy = f"`cxr-vae inspect {inputs.shards}` makes it."
    inputs.inspection, sentence = read_checked(inputs.shards / INSPECTION, Record, remedy)
    if inputs.inspection is None:
        where = "" if inputs.shards.is_dir() else f" ({inputs.shards} is not there, seen from this folder)"
        inputs.missing["data"] = f"No inspection of the data: {sentence}{where}"
        return
    splits = read_optional(inputs.shards / MANIFEST).get("splits", {})  # our own file: its form is known
    if inputs.inspection.index_hashes != {name: split["index"]["sha256"] for name, split in splits.items()}:
        inputs.inspection = None
        inputs.missing["data"] = f"{INSPECTION} is of other shards than are there now: {remedy}"
