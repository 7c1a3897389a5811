"""Each committed table has the command that makes it again, and that could be typed."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import TABLES, commands_of
from tests.documents import ROOT, check_command


def test_every_result_has_its_command() -> None:
    results = {path.stem[len("2026-11-22-") :] for path in (ROOT / "benchmarks/results").glob("*.md")}
    assert results == TABLES.keys()


@pytest.mark.parametrize("table", TABLES)
def test_its_commands_could_be_typed(table: str) -> None:
    for command in commands_of(table, "chest_xray", Path("work")):
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            script = inspect.getsource(importlib.import_module(words[2]))
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), command
        elif words[0] == "slurm/local_cluster":
            assert f"slurm/local_cluster {words[1]}" in (ROOT / words[0]).read_text(), command
        elif words[0] == "bash":
            assert subprocess.run(["bash", "-n", "-c", words[-1]], check=False).returncode == 0, command
        else:
            check_command(command)


def test_it_stops_at_the_first_command_that_fails(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.tables", "memorisation", "--data", tmp_path / "none", "--work", tmp_path / "work"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert re.match(r"\$ python -m benchmarks.memorisation .*none", done.stdout)
