"""The short forms of benchmarks: every kind of kill once, every kind of damage once, every cost measured once.

benchmarks/elastic.py has its short form in test_distributed.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import environment


def benchmark(name: str, *arguments: str, missed: bool = False) -> str:
    """What it prints; where a target of time may be `missed`, since others work on this machine, too."""
    call = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    result = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode in ((0, 1) if missed else (0,)), result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(3600)
def test_every_kind_of_kill_once(shards: Path) -> None:
    told = benchmark("faults", "--kills=12", "--kills-a-run=6", f"--shards={shards}")
    assert "12 of 12 kills in runs that ended equal, bit for bit" in told
    assert len(re.findall(r"^(?:one rank|all ranks|torchrun|before|inside|after|write)", told, re.MULTILINE)) >= 11


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_every_kind_of_damage_once(shards: Path) -> None:
    told = benchmark("corruption", "--rounds=1", f"--shards={shards}")
    assert "19 of 19 found, told, fallen back from; nothing executed" in told


def test_the_cost_of_a_save_is_measured(tmp_path: Path) -> None:
    told = benchmark("checkpoint_cost", "--rounds=1", "--models", "reference", f"--out={tmp_path}", missed=True)
    for method in ("ours", "torch.save", "dcp.save"):
        assert re.search(rf"^reference +{method} +183 ", told, re.MULTILINE), told
    assert "target: ours blocks for at most 0.5 x torch.save" in told


def test_the_cost_of_resuming_is_measured_and_takes_less_than_a_gibibyte(shards: Path) -> None:
    far = 10**10
    told = benchmark("resume_cost", str(shards), "--rounds=1", "--num=20000", "--positions", "0", str(far), missed=True)
    rows = re.findall(rf"^ *(70|20,000) +(0|{far:,}) .* (\d+) +(\d+)$", told, re.MULTILINE)
    assert len(rows) == 4, told
    assert all(int(peak) < 1074 for _, _, peak, _ in rows)
