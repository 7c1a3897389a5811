"""Jobs on a real Slurm that are interrupted: the short form of benchmarks/slurm_chaos.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_helpers import SlurmCluster


@pytest.mark.timeout(5200)
def test_every_interruption_resumes_by_itself_and_the_end_is_the_same(
    slurm_cluster: SlurmCluster, shards: Path
) -> None:
    events = ["preempted", "preempted_without_grace", "node_failure", "scontrol_requeue", "time_limit", "rank_killed"]
    call = [
        sys.executable,
        *("-m", "benchmarks.slurm_chaos"),
        "--rounds=1",
        "--ranks=1",
        "--epochs=400",
        f"--shards={shards}",
    ]
    environment = slurm_cluster.env | {"CXR_SLURM_DIR": str(slurm_cluster.folder)}
    result = subprocess.run(
        [*call, "--events", *events], env=environment, capture_output=True, text=True, check=False, timeout=5000
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 interruptions of one run of 2 x 1 processes, which ended equal, bit for bit" in result.stdout
    assert "none where a signal came in time: held" in result.stdout
