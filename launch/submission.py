"""From a configuration to jobs: what is checked before anything is queued, and what is queued."""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cxr_vae.config import Config, ResourcesConfig, check_batch
from cxr_vae.config_file import dump_config, load_config
from cxr_vae.console import counted
from cxr_vae.data.index import MANIFEST
from cxr_vae.errors import UserError
from cxr_vae.files import write_atomically
from cxr_vae.run_dir import RunDir
from launch import slurm_commands
from launch.clusters import Cluster, ThisMachine
from launch.profiles import Profile, gpus_of, load_profile, minutes_of, sbatch_of, sbatch_options, shape_of
from launch.slurm_queue import Slurm
from launch.stages import Shape, Stage, stages_of
from launch.status import running_job
from launch.sweeps import combinations, grid_of, name_of

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Where each machine has its own files."""


@dataclass(frozen=True)
class Submission:
    """A configuration, and where its stages are to run."""

    config: Config
    where: str
    profile_name: str | None
    profile: Profile
    sbatch: dict[str, str | bool]

    @classmethod
    def of(cls, arguments: argparse.Namespace, overrides: Sequence[str] | None = None) -> "Submission":
        """As the command line says; UserError where it can't be."""
        config = load_config(arguments.config, arguments.overrides if overrides is None else overrides)
        where = arguments.cluster or choose_cluster(arguments.profile)
        if where != "slurm" and config.resources.nodes > 1:
            raise UserError(f"resources.nodes={config.resources.nodes}: this is one machine; use --cluster slurm")
        profile = load_profile(arguments.profile if where == "slurm" else None)
        made = cls(config, where, arguments.profile, profile, sbatch_of(arguments.sbatch))
        if where == "slurm" and arguments.profile is None:  # nobody should wait for a training on one core unawares
            size, gpus = made.shape, gpus_of(config, profile)
            ranks, cores = size.ranks_per_node, size.ranks_per_node * size.cpus_per_rank
            each = f"{counted(ranks, 'rank')}, {counted(cores, 'core')} and {counted(gpus, 'GPU')}"
            print(f"without --profile a node is asked for {each}, as `resources` says", flush=True)
        return made

    @property
    def shape(self) -> Shape:
        """How many processes of which size."""
        if self.where == "slurm":
            return shape_of(self.config, self.profile, self.profile_name)
        resources = self.config.resources
        ranks = resources.processes_per_node or resources.gpus_per_node
        return Shape(1, ranks or (count_gpus() if self.config.device != "cpu" else 0) or 1, 0)

    @property
    def cluster(self) -> Cluster:
        """Where to."""
        if self.where != "slurm":
            return ThisMachine(self.where)
        gpus = gpus_of(self.config, self.profile)
        plain = sbatch_options(self.config, self.profile, gpus=int(self.profile.gpu_in_every_job)) | self.sbatch
        computing = sbatch_options(self.config, self.profile, gpus=gpus) | self.sbatch
        return Slurm(self.profile, plain, minutes_of(self.config, self.profile), computing)

    def submit(self, name: str, *, dry_run: bool) -> int:
        """Checks everything that can be known before, then queues the stages or says what would be."""
        run = RunDir(Path(self.config.run_dir))
        run.check(self.config)
        resolved = run.jobs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.yaml"
        stages = stages_of(name, self.config, resolved, self.shape)
        check_batch(self.config, self.shape.nodes * self.shape.ranks_per_node)
        cluster = self.cluster
        if dry_run:
            print(cluster.describe(stages))
            return 0
        self.check(stages)
        resolved.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(resolved, dump_config(self.config))  # what is edited while a job waits doesn't change it
        code = cluster.submit(stages, {"profile": self.profile_name, "config": str(resolved)})
        if self.where != "inline":
            print(f"how it stands: cxr-launch status {run.path}; what it prints: cxr-launch logs {run.path} --follow")
        return code

    def check(self, stages: Sequence[Stage]) -> None:
        """UserError where a stage would find out only later that it can't do its work."""
        run, names = RunDir(Path(self.config.run_dir)), [stage.name for stage in stages]
        for stage in stages:
            other = running_job(run, stage.name)
            if other is not None:
                raise UserError(
                    f"{run.path} has a {stage.name} job already ({other.job}, {other.state}): wait for it, or end "
                    f"it with `cxr-launch cancel {run.path}`"
                )
        source = self.config.data.source
        if "shard" in names and not Path(source or "").is_dir():
            raise UserError(f"data.source={source} is no folder here: name that of the images, split/class/*.jpeg")
        if "train" in names:
            shards = self.config.data.shards
            if self.where != "slurm" and self.config.train.compile != "off":  # a node may have another compiler
                from cxr_vae.training.compilation import check_compiler

                check_compiler(self.config.train.compile)
            if "shard" not in names and not (Path(shards) / MANIFEST).is_file():
                raise UserError(f"data.shards={shards} holds no shards: write them with cxr-launch shard")
        if {"prior", "evaluate"} & set(names) and "train" not in names and not run.weights.is_file():
            raise UserError(f"{run.path} holds no trained weights: train first, or use cxr-launch pipeline")
        if "prior" in names:
            from cxr_vae.training.fit_prior import check_prior

            check_prior(self.config)  # a pipeline would find out only after the training
        if "evaluate" in names:
            name = self.config.prior.name
            if self.config.needs_fitted_prior and "prior" not in names and not run.prior(name).is_file():
                raise UserError(f"{run.path} has no {name} prior yet: fit it with cxr-launch prior")
            if self.config.evaluate.features == "inception":
                from cxr_vae.evaluation.inception_weights import require_weights

                require_weights()  # a pipeline would find out only after the training
        if self.where == "slurm" and not self.profile.shared_disks:
            check_shared(run.path)
            check_shared(Path(self.config.data.shards))


def choose_cluster(profile: str | None) -> str:
    """Slurm where its controller answers or a profile is named, else this machine."""
    if profile is not None or slurm_commands.controller_answers():
        return "slurm"
    if shutil.which("sbatch") is not None:
        print(
            "warning: Slurm's controller doesn't answer: this machine it is; --cluster names another", file=sys.stderr
        )
    return "local"


def check_shared(path: Path) -> None:
    """UserError where a path is surely one of this machine only."""
    whole = path.absolute()
    disks = sorted(psutil.disk_partitions(all=True), key=lambda disk: len(disk.mountpoint))
    kind = next((disk.fstype for disk in reversed(disks) if whole.is_relative_to(disk.mountpoint)), "")
    if kind in ("tmpfs", "ramfs") or any(whole.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        raise UserError(
            f"{path} is on a disk of this machine only, which the nodes of the cluster don't see: name a folder in "
            "your home or project space (or set shared_disks: true in the cluster profile, if they do see it)"
        )


@functools.cache
def count_gpus() -> int:
    """GPUs torch sees; asked in another process, since importing it takes seconds and memory."""
    code = "import torch; print(torch.cuda.is_available() * torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    return int(answer.stdout)


def is_size(key: str) -> bool:
    """Whether an option, perhaps without its section, is one that a sweep can't vary."""
    return key == "run_dir" or key.rpartition(".")[2] in ResourcesConfig.model_fields


def sweep(arguments: argparse.Namespace) -> int:
    """`cxr-launch sweep`: an array of trainings, and the table of their results when all have ended."""
    grid = grid_of(arguments.overrides, arguments.grid)
    runs = combinations(grid)
    names = [name_of(overrides, grid) for overrides in runs]
    if len(set(names)) < len(names):
        raise UserError("two runs of this sweep would have the same directory: name values that differ")
    sizes = [key for key, values in grid.items() if len(values) > 1 and is_size(key)]
    if sizes:
        raise UserError(f"{sizes[0]}: all runs of a sweep have the same size, and a directory of their own")
    base = Submission.of(arguments, runs[0])
    folder = Path(base.config.run_dir)
    if RunDir(folder).config.is_file():  # its table would be a report of that run
        raise UserError(f"{folder} is a run: name another folder for the sweep, as in run_dir=runs/sweep")
    stages, submissions = [], []
    for overrides in runs:
        run_dir = folder / name_of(overrides, grid)
        config = load_config(arguments.config, [*overrides, f"run_dir={run_dir}"])
        one = replace(base, config=config)
        RunDir(run_dir).check(config)
        stages += stages_of("train", config, RunDir(run_dir).jobs / "train.yaml", one.shape)
        check_batch(config, stages[-1].num_ranks)
        if not arguments.dry_run:
            one.check(stages[-1:])
        submissions.append(one)
    table = Stage("report", ("report", str(folder)), run=folder, output=folder)
    if arguments.dry_run:
        print(base.cluster.describe_sweep(stages, table))
        return 0
    for one, stage in zip(submissions, stages, strict=True):
        stage.run_dir.jobs.mkdir(parents=True, exist_ok=True)
        write_atomically(stage.run_dir.jobs / "train.yaml", dump_config(one.config))
    code = base.cluster.submit_sweep(stages, table, {"profile": arguments.profile, "sweep": str(folder)})
    print(f"how it stands: cxr-launch status {folder}")
    return code
