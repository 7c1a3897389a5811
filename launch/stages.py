"""What the jobs do: each stage as a command line of `cxr-vae`, with what it needs and how far it is."""

import functools
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cxr_vae.config import Config
from cxr_vae.config_file import PRIOR_OPTIONS
from cxr_vae.data.index import MANIFEST
from cxr_vae.errors import UserError
from cxr_vae.run_dir import RunDir

UNITS = {"shard": "tars", "train": "steps", "prior": "steps and files", "evaluate": "files", "report": ""}
"""What a stage's progress is counted in."""


@dataclass(frozen=True)
class Stage:
    """One stage: `cxr-vae` with `arguments` in `nodes` x `ranks_per_node` processes."""

    name: str
    arguments: tuple[str, ...]
    run: Path
    """The run directory it belongs to."""
    output: Path
    """Where its progress shows."""
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    """0: this rank's share of what the machine lets it use."""
    token: str = field(default_factory=lambda: secrets.token_hex(3))
    """Of this submission: job ids and process ids come again."""

    @property
    def run_dir(self) -> RunDir:
        """The run it belongs to."""
        return RunDir(self.run)

    def record_path(self, job: str) -> Path:
        """Where what is known of the job with this id is kept."""
        return self.run_dir.jobs / f"{self.name}-{job}-{self.token}"

    @property
    def num_ranks(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def log_name(self) -> str:
        """What the names of its logs begin with."""
        return f"{self.run.name}-{self.name}"

    @property
    def job_log(self) -> Path:
        """What its supervisor says."""
        return self.run_dir.logs.absolute() / f"{self.log_name}-job.log"

    def progress(self) -> int:
        """A number that grows when the stage is brought on, by whatever an interruption doesn't take away."""
        if self.name == "train":
            return self.run_dir.newest_step()
        if self.name == "prior":
            steps = sum(training.newest_step() for training in self.run_dir.prior_trainings())
            return steps + len(list(self.output.glob("*.safetensors")))
        if self.name == "shard":
            return len(list(self.output.glob("*.tar"))) + (self.output / MANIFEST).exists()
        return sum(1 for path in self.output.rglob("*") if path.suffix in (".png", ".safetensors"))

    def describe_progress(self) -> str:
        """`after 500 steps`; nothing before the first."""
        progress = self.progress()
        return f" after {progress} {UNITS[self.name]}" if progress else ""


def stages_of(name: str, config: Config, resolved: Path, resources: "Shape") -> list[Stage]:
    """The stages of a command; sharding is left out where there is nothing to shard and shards are there."""
    run = Path(config.run_dir)
    size = (resources.ranks_per_node, resources.cpus_per_rank)
    train = Stage("train", ("train", str(resolved)), run, run, resources.nodes, *size)
    prior = Stage("prior", prior_arguments(config), run, run / "priors", 1, *size)
    evaluate = Stage("evaluate", evaluate_arguments(config), run, run / "evaluation", 1, *size)
    if name == "prior" and not config.needs_fitted_prior:
        raise UserError("prior.name=standard has nothing to fit: name another, as in prior.name=gmm")
    if name in ("train", "prior", "evaluate"):
        return [{"train": train, "prior": prior, "evaluate": evaluate}[name]]
    sharding = shard_stage(config, resources)
    if name == "shard":
        if sharding is None:
            raise UserError(f"data.shards={config.data.shards} is there and data.source is not set: nothing to shard")
        return [sharding]
    report = Stage("report", ("report", str(run)), run, run / "report")
    return [*([sharding] if sharding else []), train, *([prior] if config.needs_fitted_prior else []), evaluate, report]


@dataclass(frozen=True)
class Shape:
    """How many processes of which size."""

    nodes: int
    ranks_per_node: int
    cpus_per_rank: int


def shard_stage(config: Config, resources: Shape) -> Stage | None:
    """Sharding as the configuration says; None where there is no source but the shards are there."""
    data, shards = config.data, Path(config.data.shards)
    if data.source is None:
        if (shards / MANIFEST).is_file():
            return None
        raise UserError(f"data.shards={data.shards} holds no shards and data.source is not set: name a folder")
    arguments = ["shard", data.source, data.shards, f"--image-size={data.image_size}", f"--fit={data.fit}"]
    arguments += [f"--format={data.format}", f"--max-rejected={data.max_rejected}"]
    arguments += [f"--split-file={data.split_file}"] if data.split_file else []
    arguments += [f"--workers={data.workers}"] if data.workers else []
    cores = resources.ranks_per_node * resources.cpus_per_rank  # one process with all of a machine's ranks'
    return Stage("shard", tuple(arguments), Path(config.run_dir), shards, cpus_per_rank=cores)


def prior_arguments(config: Config) -> tuple[str, ...]:
    """Of the fit of the configuration's prior to the run, which may have been trained with another in its own."""
    free = (*places(config), "device", "data.workers", "data.loading")
    of_loop = ("train.cuda_graph", "train.log_every", "train.max_minutes")
    keys = (*names_in(config, "prior"), *names_in(config, "checkpoint"), *free, *of_loop)
    return ("prior", config.run_dir, *settings(config, *keys))


def evaluate_arguments(config: Config) -> tuple[str, ...]:
    """Of the evaluation of the run with the configuration's options for it, and for what images are drawn from."""
    return (
        *("evaluate", config.run_dir),
        *settings(config, *names_in(config, "evaluate"), *PRIOR_OPTIONS, *places(config), "device"),
    )


def places(config: Config) -> tuple[str, ...]:
    """Where the run's data are now."""
    return ("data.shards", *(["data.split_file"] if config.data.split_file is not None else []))


def names_in(config: Config, section: str) -> list[str]:
    """The dotted keys of a section."""
    return [f"{section}.{name}" for name in type(getattr(config, section)).model_fields]


def settings(config: Config, *keys: str) -> list[str]:
    """`key=value` of options by their dotted keys, as a command takes them."""
    values = [functools.reduce(getattr, key.split("."), config) for key in keys]
    return [f"{key}={'null' if value is None else value}" for key, value in zip(keys, values, strict=True)]
