"""The short forms of benchmarks/faults.py and corruption.py: every kind of kill once, every kind of damage once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import environment


def benchmark(name: str, *arguments: str) -> str:
    call = [sys.executable, f"benchmarks/{name}.py", *arguments]
    result = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(400)
def test_every_kind_of_kill_once(shards: Path) -> None:
    told = benchmark("faults", "--kills=12", "--kills-a-run=6", f"--shards={shards}")
    assert "12 of 12 kills in runs that ended equal, bit for bit" in told
    assert len(re.findall(r"^(?:one rank|all ranks|torchrun|before|inside|after|write)", told, re.MULTILINE)) >= 11


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_every_kind_of_damage_once(shards: Path) -> None:
    told = benchmark("corruption", "--rounds=1", f"--shards={shards}")
    assert "19 of 19 found, told, fallen back from; nothing executed" in told
