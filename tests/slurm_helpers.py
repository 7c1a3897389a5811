"""A Slurm of the tests' own, which slurm/local_cluster starts."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import HANG_S, environment

SCRIPT = Path(__file__).parents[1] / "slurm/local_cluster"
OF_SLURM = re.compile("(SLURM|SBATCH|SRUN|SALLOC|SUBMITIT|SQUEUE|SINFO|SACCT|SCANCEL)_")
"""Variables with which a Slurm or submitit around the tests would reach into them."""


@dataclass(frozen=True)
class SlurmCluster:
    folder: Path
    env: dict[str, str]
    """What a process needs to be its client."""

    def control(self, *arguments: str, **extra: str) -> "subprocess.CompletedProcess[str]":
        """Runs `slurm/local_cluster …` for this cluster."""
        command = [sys.executable, str(SCRIPT), *arguments, "--dir", str(self.folder)]
        return subprocess.run(
            command, env=self.env | extra, capture_output=True, text=True, check=False, timeout=HANG_S
        )

    def run(self, *command: str) -> str:
        """Runs a command that has to succeed; returns its output."""
        for _ in range(5):
            result = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=HANG_S)
            asks = command[0] in ("squeue", "sinfo", "sacct") or command[:2] == ("scontrol", "show")
            if not asks or "timed out" not in result.stderr:  # a busy machine's controller
                break
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def submit(self, script: str, *options: str) -> str:
        """Queues a bash script; returns the job's id."""
        return self.run("sbatch", "--parsable", f"--chdir={self.folder}", *options, f"--wrap={script}").strip()

    def state(self, job: str) -> str:
        """What squeue says of a job; empty where it is gone."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()


@contextmanager
def local_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster in an empty folder with a short path; where there can be none, the test is skipped."""
    reason = why_not()
    if reason:
        pytest.skip(f"a Slurm of the tests' own needs {reason}")
    kept = {name: value for name, value in environment().items() if not OF_SLURM.match(name)}
    cluster = SlurmCluster(folder, kept | {"SLURM_CONF": str(folder / "etc/slurm.conf")})
    started = cluster.control("up")
    if "missing" in started.stderr:
        installed = cluster.control("install")
        assert installed.returncode == 0, installed.stderr
        started = cluster.control("up")
    try:
        assert started.returncode == 0, started.stderr
        yield cluster
    finally:
        stopped = cluster.control("down")
        assert stopped.returncode == 0, stopped.stderr


def why_not() -> str:
    """What this machine lacks for a cluster, or nothing."""
    if os.geteuid():
        return "root"
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        return "Debian"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        return "the right to make namespaces"
    return ""
