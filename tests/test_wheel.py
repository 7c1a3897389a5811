"""The wheel is whole: installed without the checkout, its commands find all they need, configurations included."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers import TINY, environment

ROOT = Path(__file__).parents[1]
PARTS = ("cxr_vae", "launch", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder of a new environment with the wheel, and with this environment's other packages."""
    copy, wheels, env = (tmp_path_factory.mktemp("wheel") / name for name in ("copy", "wheels", "env"))
    copy.mkdir()
    for name in PARTS:  # the checkout stays as it is
        path = ROOT / name
        shutil.copytree(path, copy / name, symlinks=True) if path.is_dir() else shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, copy], check=True)
    venv.create(env, with_pip=False)
    python = env / "bin/python"
    (wheel,) = wheels.glob("cxr_vae-*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return env / "bin"


def run(folder: Path, program: Path, *arguments: str) -> str:
    """What it prints, called in `folder` where the checkout is nowhere on the path."""
    own = {name: text for name, text in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run([program, *arguments], cwd=folder, env=own, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_run_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(
        tmp_path, installed / "python", "-c", "import cxr_vae, launch; print(cxr_vae.__file__, launch.__file__)"
    )
    assert where.count(str(installed.parent)) == 2
    for command in ("cxr-vae", "cxr-launch"):
        assert f"usage: {command}" in run(tmp_path, installed / command, "--help")


def test_the_demo_trains_from_the_configuration_that_comes_along(installed: Path, shards: Path, tmp_path: Path) -> None:
    options = [*TINY, "epochs=1", f"data.shards={shards}", "run_dir=run"]
    run(tmp_path, installed / "cxr-vae", "train", "configs/demo.yaml", *options)
    assert (tmp_path / "run/vae_final.safetensors").is_file()
    run(tmp_path, installed / "cxr-vae", "report", "run")
    assert (tmp_path / "run/report.html").is_file()


def test_profiles_come_along(installed: Path, tmp_path: Path) -> None:
    command = ["train", "configs/reference.yaml", "--profile", "local_cluster", "--dry-run"]
    assert "#SBATCH" in run(tmp_path, installed / "cxr-launch", *command)
