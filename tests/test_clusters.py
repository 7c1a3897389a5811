"""What is queued, with commands of Slurm's that say what a test lets them."""

import os
import re
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm_queue import submitting
from launch.stages import Stage
from tests.helpers import TINY


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a run on a cluster that takes arrays and refuses other jobs; `cancelled` says what was cancelled."""
    sbatch = 'grep -q -e --array "$1" && echo Submitted batch job 12 || { echo "sbatch: error: no room" >&2; exit 1; }'
    scripts = {"sinfo": "", "srun": "", "squeue": "", "sbatch": sbatch, "scancel": f'echo "$@" > {tmp_path}/cancelled'}
    for name, script in scripts.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").touch()
    (tmp_path / "profile.yaml").write_text("shared_disks: true\n")
    paths = (f"data.shards={tmp_path}/shards", f"run_dir={tmp_path}/sweep")
    return ["configs/reference.yaml", *TINY, *paths, "--cluster=slurm"]


def test_an_array_is_cancelled_where_the_job_for_its_table_is_refused(
    told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *told, "lr=1e-3,1e-4", f"--profile={tmp_path}/profile.yaml"]) == 2
    assert "error: Slurm refuses the report job: sbatch: error: no room" in capsys.readouterr().err
    assert (tmp_path / "cancelled").read_text() == "12\n"
    assert list(tmp_path.glob("sweep/*/jobs/train-*/job.json")) == []  # nothing that status would take for a job


def test_a_sweep_is_not_put_into_a_run(told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/config.yaml").touch()
    assert main(["sweep", *told, "lr=1e-3,1e-4"]) == 2
    assert f"error: {tmp_path}/sweep is a run: name another folder for the sweep" in capsys.readouterr().err


def test_jobs_that_compute_nothing_ask_for_one_gpu_where_they_must(
    told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, run = tmp_path / "gpus.yaml", [*told, "data.source=chest_xray", "--dry-run"]
    size = "gpus_per_node: 4\ncpus_per_node: 8\nmemory_gb: 64\ngpu_option: gres=gpu:a100:{gpus}\nshared_disks: true\n"
    for more, first in (("", []), ("gpu_in_every_job: true\n", ["--gres=gpu:a100:1"])):
        profile.write_text(size + more)
        assert main(["pipeline", *run, f"--profile={profile}"]) == 0
        scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
        asked = [re.findall(r"^#SBATCH (--gres=\S+)", script, re.MULTILINE) for script in scripts]
        assert asked == [first, ["--gres=gpu:a100:4"], ["--gres=gpu:a100:4"], first]


def test_without_a_profile_it_says_how_little_it_asks_for(told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *told, "--dry-run"]) == 0
    assert "without --profile a node is asked for 1 rank, 1 core and 0 GPUs" in capsys.readouterr().out
    assert main(["train", *told, "--dry-run", "gpus_per_node=2", "cpus_per_process=3"]) == 0
    assert "a node is asked for 2 ranks, 6 cores and 2 GPUs" in capsys.readouterr().out


def test_what_people_set_once_for_all_holds_where_the_profile_says_nothing(monkeypatch, tmp_path: Path) -> None:
    ours = {"SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/etc/c"}
    around = {"SBATCH_PARTITION": "long", "SBATCH_TIMELIMIT": "1", "SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}
    for name, value in (ours | around).items():
        monkeypatch.setenv(name, value)
    with submitting(Stage("report", ("report", "run"), run=tmp_path, output=tmp_path), {"partition": "gpu"}):
        assert {name: os.environ.get(name) for name in ours | around} == ours | dict.fromkeys(around)
    assert {name: os.environ[name] for name in ours | around} == ours | around
