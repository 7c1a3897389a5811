"""The directory of one training run: what lies where, and whose it is."""

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cxr_vae.checkpoints.manifest import published
from cxr_vae.config import Config
from cxr_vae.config_file import differences, dump_config, load_config
from cxr_vae.errors import UserError
from cxr_vae.files import write_atomically, write_json
from cxr_vae.locks import LOCK, DirectoryLock

PACKAGES = ("cxr-vae", "torch", "torchvision", "webdataset", "submitit", "torch-fidelity", "numpy", "scipy", "pillow")


@dataclass(frozen=True)
class RunDir:
    """Paths below a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Losses, a JSON object a line; the same for equal runs, however often they were broken off."""
        return self.path / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """Time and images/s, a JSON object a line; these differ from run to run."""
        return self.path / "speed.jsonl"

    @property
    def efficiency(self) -> Path:
        """What the time of the last stretch of training went into, and how near it came to what the device can do."""
        return self.path / "efficiency.json"

    @property
    def profile(self) -> Path:
        """Directory of a profiler's trace."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The trained weights, there when training has finished."""
        return self.path / "vae_final.safetensors"

    @property
    def curves(self) -> Path:
        """Plot of the losses over epochs."""
        return self.path / "loss_curves.png"

    @property
    def evaluation(self) -> Path:
        """Directory of generated and real images and the figures computed from them."""
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        """The figures."""
        return self.evaluation / "evaluation_results.json"

    def prior(self, name: str) -> Path:
        """A prior that was fitted to the trained weights, by its name."""
        return self.path / "priors" / f"{name}.safetensors"

    def prior_training(self, name: str, digest: str) -> "RunDir":
        """Where a prior is trained: a run directory of its own for each thing that was asked for."""
        return RunDir(self.path / "priors" / f"{name}-{digest[:8]}")

    def prior_trainings(self) -> "list[RunDir]":
        """Those there are."""
        return [RunDir(path.parent) for path in sorted(self.path.glob("priors/*/config.yaml"))]

    @property
    def jobs(self) -> Path:
        """Directory where a launcher keeps what it knows of its jobs; it may be there before the run."""
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        """Directory of what the jobs of a launcher print; it may be there before the run."""
        return self.path / "logs"

    @property
    def heartbeat(self) -> Path:
        """Where the run is, a few seconds ago."""
        return self.path / "heartbeat.json"

    def newest_step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        return max((int(path.name.removeprefix("step-")) for path in published(self.checkpoints)), default=0)

    def grid(self, kind: str, epoch: int) -> Path:
        """`samples` or `reconstructions` after `epoch` epochs."""
        return self.path / kind / f"epoch_{epoch:04d}.png"

    def saved_config(self) -> Config:
        """The configuration the run was started with; UserError where this is no run directory."""
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run directory (it has no {self.config.name}): name one train wrote")
        return load_config(self.config)

    def check(self, config: Config) -> None:
        """Raises UserError unless this is a new directory or one of a run with an equal configuration."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a new folder as run_dir")
        if not self.config.is_file():
            ours = {self.jobs.name, self.logs.name, f".{self.config.name}.tmp", LOCK}
            foreign = sorted({path.name for path in self.path.iterdir()} - ours) if self.path.exists() else []
            if foreign:
                raise UserError(f"{self.path} holds something else ({foreign[0]}); name a new folder as run_dir")
            return
        changed = differences(load_config(self.config), config)
        if changed:
            raise UserError(
                f"{self.path} holds a run with another configuration ({'; '.join(changed)}): "
                "go on with its own, or name another run_dir"
            )

    def take(self, config: Config) -> DirectoryLock:
        """Keeps other processes out of the directory, as long as the lock is held; raises as `check` does."""
        lock = DirectoryLock(self.path)
        self.check(config)  # once more: another process may have just left
        return lock

    def claim(self, config: Config, facts: Mapping[str, Any]) -> None:
        """Writes the configuration and environment of this attempt (first rank only)."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, dump_config(config))
        for folder in ("samples", "reconstructions"):
            (self.path / folder).mkdir(exist_ok=True)
        write_json(self.path / "environment.json", environment() | dict(facts))


def environment() -> dict[str, Any]:
    """What a run ran on and with."""
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "git": git_revision(),
        "versions": {package: version(package) for package in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_revision() -> str | None:
    """Of the checkout this code runs from, with `-dirty` where files in it differ; None without one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed, maybe into a venv inside the checkout of something else
        return None
    call = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
