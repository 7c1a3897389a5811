"""What a cluster gives and how it wants to be asked: `configs/cluster/*.yaml`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from cxr_vae.config import Config, Section
from cxr_vae.config_file import SHIPPED, config_path, load_section
from cxr_vae.errors import UserError
from launch.stages import Shape

FOLDER = Path("configs/cluster")

OURS = {
    "nodes": "set resources.nodes",
    "ntasks": "set resources.nodes and resources.processes_per_node",
    "ntasks-per-node": "set resources.processes_per_node",
    "gpus": "set resources.gpus_per_node",
    "gpus-per-node": "set resources.gpus_per_node",
    "gpus-per-task": "set resources.gpus_per_node",
    "cpus-per-task": "set resources.cpus_per_process",
    "time": "set resources.hours",
    "signal": "set signal_delay_s in the cluster profile",
    "output": "leave it out, logs are in the run directory",
    "requeue": "leave it out, jobs go back into the queue by themselves",
    "no-requeue": "leave it out, `cxr-launch cancel` ends a job for good",
}
"""Options of sbatch that the ranks and the supervisor must agree with: what to do in place of giving them."""


class Profile(Section):
    """One partition of one cluster, for one account."""

    partition: str | None = Field(None, description="null: the cluster's default")
    account: str | None = Field(None, description="whom the time is charged to; null: your default")
    qos: str | None = Field(None, description="quality of service; null: the default")
    constraint: str | None = Field(None, description="features the nodes must have, such as a100|h100")
    max_nodes: int | None = Field(None, ge=1, description="nodes a job may have; null: Slurm says")
    gpus_per_node: int = Field(0, ge=0, description="GPUs a node has")
    gpu_option: str = Field("gpus-per-node={gpus}", description="how GPUs are asked for, as gres=gpu:a100:{gpus}")
    gpu_in_every_job: bool = Field(
        False, description="true: the partition refuses jobs without a GPU, so those that need none ask for one"
    )
    cpus_per_node: int | None = Field(
        None, ge=1, description="cores a node has; null: a rank gets one unless the configuration says more"
    )
    memory_gb: int | None = Field(None, ge=1, description="memory a node has; null: Slurm's default is taken")
    max_hours: float | None = Field(None, gt=0, description="longest time limit; null: Slurm says")
    signal_delay_s: int = Field(
        120, ge=20, description="how long before its time limit a job is told to save; a save must fit in"
    )
    setup: list[str] = Field([], description="shell lines before the ranks start, such as module load cuda")
    python: list[str] = Field([], description="command of the Python of the ranks, such as [apptainer, exec, --nv, …]")
    sbatch: dict[str, str | int | bool] = Field({}, description="further options of sbatch, by their long names")
    srun: list[str] = Field([], description="further options of srun")
    shared_disks: bool = Field(False, description="true: all nodes see even /tmp of this one, as on a single machine")


def load_profile(name: str | None) -> Profile:
    """A profile by its file or the name of one in configs/cluster; without a name, one that asks for nothing."""
    if name is None:
        return Profile()
    path = Path(name)
    if not path.suffix:
        path = FOLDER / f"{name}.yaml"
    if not config_path(path).is_file():
        known = sorted({found.stem for folder in (FOLDER, SHIPPED / "cluster") for found in folder.glob("*.yaml")})
        raise UserError(f"{path}: there is no such cluster profile; name a YAML file, or one of {', '.join(known)}")
    profile = load_section(Profile, path)
    refuse_ours(profile.sbatch, f"sbatch in {path}")
    return profile


def sbatch_of(words: Sequence[str]) -> dict[str, str | bool]:
    """`KEY=VALUE` and bare `KEY`, as people give them on the command line, by long names."""
    options: dict[str, str | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or (equals and not value):
            raise UserError(f"--sbatch {word}: write KEY=VALUE or KEY, as in --sbatch partition=gpu --sbatch exclusive")
        options[key.replace("_", "-")] = value if equals else True
    refuse_ours(options, "--sbatch")
    return options


def refuse_ours(options: Mapping[str, Any], where: str) -> None:
    """UserError where options of sbatch are among those that the launcher sets."""
    for key in options:
        remedy = OURS.get(key.replace("_", "-"))
        if remedy is not None:
            raise UserError(f"{where}: {key} is the launcher's own: {remedy}")


def shape_of(config: Config, profile: Profile, name: str | None) -> Shape:
    """How many processes of which size; UserError where the profile can't give them."""
    resources = config.resources
    gpus = gpus_of(config, profile)
    ranks = resources.processes_per_node or gpus or 1
    whole = profile.cpus_per_node
    cpus = resources.cpus_per_process or max(1, (whole or 0) // ranks)
    asked: Mapping[str, tuple[Any, Any, str]] = {
        "resources.nodes": (resources.nodes, profile.max_nodes, "max_nodes"),
        "resources.gpus_per_node": (gpus, profile.gpus_per_node if name else None, "gpus_per_node"),
        "resources.cpus_per_process x processes_per_node": (cpus * ranks, whole, "cpus_per_node"),
        "resources.memory_gb": (resources.memory_gb, profile.memory_gb, "memory_gb"),
        "resources.hours": (resources.hours, profile.max_hours, "max_hours"),
    }
    for key, (wanted, given, limit) in asked.items():
        if wanted is not None and given is not None and wanted > given:
            raise UserError(f"{key}={wanted:g} is more than the {given:g} of {limit} in the cluster profile {name}")
    return Shape(resources.nodes, ranks, cpus)


def gpus_of(config: Config, profile: Profile) -> int:
    """GPUs a node: as the configuration says, else all the profile's nodes have."""
    asked = config.resources.gpus_per_node
    return profile.gpus_per_node if asked is None else asked


def minutes_of(config: Config, profile: Profile) -> int:
    """The time limit of a job: as the configuration says, else the profile's, else a day."""
    return max(1, round(60 * (config.resources.hours or profile.max_hours or 24.0)))


def sbatch_options(config: Config, profile: Profile, *, gpus: int) -> dict[str, Any]:
    """What sbatch is told besides the numbers of nodes, tasks and cores, by long names; True for a bare one."""
    named = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    options: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if gpus:
        try:
            key, _, value = profile.gpu_option.format(gpus=gpus).partition("=")
        except (KeyError, IndexError, ValueError):
            raise UserError(f"gpu_option={profile.gpu_option!r}: only {{gpus}} stands for something there") from None
        options[key] = value
    memory = config.resources.memory_gb or profile.memory_gb
    if memory:
        options["mem"] = f"{memory}G"
    return options | dict(profile.sbatch)
