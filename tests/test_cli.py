import functools
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import cxr_vae
from tests.helpers import command, environment
from tests.helpers import cxr_vae as call

COMMANDS = {
    "cxr-vae": [
        *("phantom", "split", "shard", "inspect"),
        *("train", "checkpoints", "export", "prior", "generate", "evaluate", "audit", "report", "fetch-weights"),
        "config",
    ],
    "cxr-launch": ["shard", "train", "prior", "evaluate", "pipeline", "sweep", "status", "logs", "cancel", "doctor"],
}
ALL = [(program, name) for program, names in COMMANDS.items() for name in names]


@functools.cache
def help_of(program: str, name: str) -> str:
    result = call(name, "--help", program=program)
    assert result.returncode == 0
    return result.stdout


@pytest.mark.parametrize("program", COMMANDS)
def test_help_lists_every_command(program: str) -> None:
    result = call("--help", program=program)
    assert result.returncode == 0
    listed = re.findall(r"^    ([a-z-]+)", result.stdout, re.MULTILINE)
    assert listed == COMMANDS[program]


@pytest.mark.parametrize(("program", "name"), ALL)
def test_help_of_a_command_shows_defaults_and_an_example(program: str, name: str) -> None:
    text = help_of(program, name)
    assert "example: " in text
    assert f"{program} {name}" in text or "cxr_vae train" in text
    options = re.findall(r"^  (--[a-z-]+)(?: |$)", text, re.MULTILINE)
    assert (
        text.count("default")
        >= len([option for option in options if option not in ("--out", "--dry-run", "--grid")]) - 1
    )
    assert "None" not in text


@pytest.mark.parametrize(("program", "name"), ALL)
def test_examples_parse(program: str, name: str) -> None:
    text = " ".join(help_of(program, name).split("example: ")[1].split())
    words = re.sub(r"^.*?(?:-m cxr_vae|cxr-vae|cxr-launch) ", "", text, count=1).split()
    if program == "cxr-vae":
        from cxr_vae.cli import build_parser
    else:
        from launch.cli import build_parser
    arguments, rest = build_parser().parse_known_args(words)
    assert callable(arguments.command)
    assert all("=" in word for word in rest)


@pytest.mark.parametrize("program", COMMANDS)
def test_version(program: str) -> None:
    assert call("--version", program=program).stdout.strip() == f"{program} {cxr_vae.__version__}"


@pytest.mark.parametrize(("program", "module"), [("cxr-vae", "cxr_vae.cli"), ("cxr-launch", "launch.cli")])
def test_help_needs_no_torch_and_comes_within_a_second(program: str, module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'submitit', 'scipy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

    def seconds(*call: str) -> float:
        """Of the processor: others work on this machine, too."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(call, env=environment(), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    least, of_python = (
        min(seconds(*call) for _ in range(3)) for call in (command(program, "--help"), [sys.executable, "-c", "pass"])
    )
    assert least < max(1, 25 * of_python)  # a slow machine's Python takes its time, too


def test_a_mistyped_command_lists_the_right_ones() -> None:
    result = call("trian")
    assert result.returncode == 2
    assert "train" in result.stderr
    assert "Traceback" not in result.stderr


def test_options_and_key_value_may_come_in_any_order() -> None:
    one = call("train", "configs/reference.yaml", "--dry-run", "epochs=3", program="cxr-launch")
    assert one.returncode == 0, one.stderr
    wrong = call("train", "configs/reference.yaml", "--drry-run", "epochs=3", program="cxr-launch")
    assert wrong.returncode == 2
    assert "--drry-run" in wrong.stderr


def test_config_shows_the_resolved_options() -> None:
    result = call("config", "configs/reference.yaml", "epochs=7")
    assert re.search(r"^  epochs: 7 +# passes over", result.stdout, re.MULTILINE)
    assert call("config", "latent_dim=7").stdout.count("latent_dim: 7") == 1


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "from cxr_vae.commands.command_line import run; import argparse; "
        "run(lambda arguments: 1 // 0, argparse.Namespace(), 'cxr-vae')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(("where", "code"), [("> /dev/full", 2), (">&-", 0)])
def test_what_can_not_be_printed_at_the_end(where: str, code: int) -> None:
    """A full disk is told, also where the last line meets it; no stdout at all is somebody's wish."""
    program = (
        "from cxr_vae.commands.command_line import run; import argparse, sys; "
        "sys.exit(run(lambda arguments: print(7) or 0, argparse.Namespace(), 'cxr-vae'))"
    )
    shell = ["bash", "-c", f'"$1" -c "$2" {where}', "bash", sys.executable, program]
    result = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == bool(code), result.stderr
    assert ("make room" in result.stderr) == bool(code)


def test_a_closed_pipe_is_no_error() -> None:
    shell = ["bash", "-c", f"{sys.executable} -m cxr_vae config | head -1"]
    result = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert result.stderr == ""
