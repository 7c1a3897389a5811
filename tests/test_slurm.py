"""Jobs on a real Slurm; those that are interrupted: test_slurm_interruptions.py."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.faults import same
from cxr_vae.checkpoints.manifest import published
from launch.records import records_of
from tests.helpers import HANG_S, TINY, check_saved_at_its_end, check_sentence, command, held_after, wait_until
from tests.slurm_helpers import SlurmCluster

SMALL = (*TINY, "cpus_per_process=1", "resources.memory_gb=1", "checkpoint.every_steps=1000")


class Launcher:
    """cxr-launch as a client of the cluster."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster

    def __call__(self, *arguments: object, **extra: str) -> "subprocess.CompletedProcess[str]":
        call = command("cxr-launch", *arguments)
        return subprocess.run(
            call, env=self.cluster.env | extra, capture_output=True, text=True, check=False, timeout=HANG_S
        )

    def submit(self, *arguments: object, **extra: str) -> list[str]:
        """Ids of the jobs queued."""
        result = self(*arguments, "--profile=local_cluster", **extra)
        assert result.returncode == 0, result.stderr
        return re.findall(r"job (\d+\S*)", result.stdout)

    def status(self, run: Path) -> dict[str, dict]:
        """By run and stage."""
        found = json.loads(self("status", run, "--json").stdout)
        return {f"{Path(one['run']).name}/{one['stage']}": one for one in found}


@pytest.fixture
def launch(slurm_cluster: SlurmCluster) -> Launcher:
    return Launcher(slurm_cluster)


def training(shards: Path, run: Path, *more: str) -> list[object]:
    return ["train", "configs/reference.yaml", *SMALL, f"data.shards={shards}", f"run_dir={run}", *more]


def gone(cluster: SlurmCluster) -> bool:
    return not cluster.run("squeue", "--noheader").strip()


def trains(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 5


def test_a_pipeline_on_two_nodes_is_that_of_one_machine(
    launch: Launcher, source: Path, shards: Path, tmp_path: Path
) -> None:
    def told(where: str, *more: str) -> list[object]:
        paths = (
            f"data.source={source}",
            f"data.shards={tmp_path / where / 'shards'}",
            f"run_dir={tmp_path / where}/run",
        )
        return ["pipeline", "configs/reference.yaml", *SMALL, *paths, "features=random", "num_generated=20", *more]

    jobs = launch.submit(*told("slurm", "nodes=2", "processes_per_node=2", "epochs=3"))
    assert len(jobs) == 4
    run = tmp_path / "slurm/run"
    before = launch.status(run)
    assert before["run/evaluate"]["state"] == "waiting"
    assert "Dependency" in before["run/evaluate"]["why"]
    followed = launch("logs", run, "--follow").stdout
    assert "Fréchet distance" in followed
    assert {one["state"] for one in launch.status(run).values()} == {"done"}
    train = [log.name for log in (run / "logs").glob("run-train-*")]
    assert sorted(train) == [
        "run-train-job.log",
        *(f"run-train-node{1 + rank // 2}-rank{rank}.log" for rank in range(4)),
    ]
    environment = json.loads((run / "environment.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment["git"])
    assert environment["host"] == "node1"
    assert (run / "config.yaml").is_file()

    alone = training(shards, tmp_path / "alone", "processes_per_node=4", "epochs=3")  # on shards made elsewhere, too
    assert launch(*alone, "--cluster=inline").returncode == 0
    assert same(run, tmp_path / "alone")


def test_a_stage_that_fails_takes_those_after_it_along(launch: Launcher, source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "source")
    for path in list((broken / "train" / "NORMAL").iterdir())[:10]:
        path.write_text("no image")
    run = tmp_path / "run"
    paths = (f"data.source={broken}", f"data.shards={tmp_path / 'shards'}", f"run_dir={run}", "features=random")
    launch.submit("pipeline", "configs/reference.yaml", *SMALL, *paths)
    wait_until(lambda: gone(launch.cluster), every_s=0.5)
    stages = [f"run/{stage}" for stage in ("train", "evaluate", "report")]
    # The controller forgets cancelled jobs at once; accounting may hear of it later.
    wait_until(lambda: {launch.status(run)[stage]["state"] for stage in stages} == {"cancelled"}, every_s=2)
    status = launch("status", run)
    assert status.returncode == 1
    assert "it would meet the same again" in status.stdout
    found = launch.status(run)
    assert found["run/shard"]["state"] == "failed"
    assert "the stage before it" in found["run/train"]["why"]
    assert "images can't be read" in launch("logs", run).stdout


def test_a_sweep_is_an_array_of_runs_and_a_table(launch: Launcher, shards: Path, tmp_path: Path) -> None:
    told = ["sweep", "configs/reference.yaml", *SMALL, f"data.shards={shards}", f"run_dir={tmp_path / 'sweep'}"]
    held, go = held_after(10, tmp_path)
    jobs = launch.submit(*told, "epochs=60", "lr=1e-3,1e-4", "latent_dim=2,3", PYTHONPATH=held["PYTHONPATH"])
    array = jobs[0].partition("_")[0]
    assert jobs[:4] == [f"{array}_{number}" for number in range(4)]
    told_to_stop = next((tmp_path / "sweep").glob(f"*/jobs/train-{array}_1-*")).parents[1]
    wait_until(lambda: trains(told_to_stop))
    launch.cluster.run("scancel", "--signal=USR2", f"{array}_1")
    wait_until(lambda: next(iter(records_of(told_to_stop / "jobs"))).attempts[0].outcome == "stopped")
    go.touch()
    wait_until(lambda: gone(launch.cluster), every_s=0.5)
    found = launch.status(tmp_path / "sweep")
    assert {one["state"] for one in found.values()} == {"done"}
    assert {one["job"]: one["attempt"] for one in found.values() if one["stage"] == "train"} == {
        job: 2 if job.endswith("_1") else 1 for job in jobs[:4]
    }
    assert len(found) == 5
    table = launch("logs", tmp_path / "sweep", "--stage", "report").stdout
    assert len(re.findall(r"latent_dim=[23],lr=1e-[34] +yes +60", table)) == 4


def test_status_cancel_and_twice_the_same_without_accounting(launch: Launcher, shards: Path, tmp_path: Path) -> None:
    run, cluster = tmp_path / "run", launch.cluster
    told = training(shards, run, "epochs=4000", "nodes=2")
    (job,) = launch.submit(*told)
    wait_until(lambda: published(run / "checkpoints"))  # what a save needs has been imported then
    assert cluster.control("service", "stop", "slurmdbd").returncode == 0
    try:
        status = launch.status(run)["run/train"]
        assert (status["state"], status["job"], status["attempt"]) == ("running", job, 1)
        assert status["num_steps"] == 20000
        twice = launch(*told, "--profile=local_cluster")
        check_sentence(twice, f"has a train job already ({job}, running)", program="cxr-launch")
        assert f"train job {job} cancelled" in launch("cancel", run).stdout
        wait_until(lambda: gone(cluster), every_s=0.5)
        time.sleep(8)  # a job that came back would be in the queue again by now
        assert gone(cluster)
        assert launch.status(run)["run/train"]["state"] == "cancelled"
    finally:
        assert cluster.control("service", "start", "slurmdbd").returncode == 0
    check_saved_at_its_end(run)


def test_what_is_cancelled_through_slurm_stays_so_and_the_same_command_goes_on(
    launch: Launcher, shards: Path, tmp_path: Path
) -> None:
    run, cluster = tmp_path / "run", launch.cluster
    (job,) = launch.submit(*training(shards, run, "epochs=4000"))
    wait_until(lambda: published(run / "checkpoints"))  # what a save needs has been imported then
    cluster.run("scancel", job)
    wait_until(lambda: gone(cluster), every_s=0.5)
    time.sleep(8)
    assert gone(cluster)
    wait_until(lambda: launch.status(run)["run/train"]["state"] == "cancelled", every_s=2)
    check_saved_at_its_end(run)
    step = int(published(run / "checkpoints")[0].name.rpartition("-")[2])
    (again,) = launch.submit(*training(shards, run, f"epochs={step // 5 + 2}"))
    wait_until(lambda: gone(cluster), every_s=0.5)
    status = launch.status(run)["run/train"]
    assert (status["job"], status["state"], status["attempt"]) == (again, "done", 1)
    assert f"going on from step-{step:010d}" in launch("logs", run, "--stage=train").stdout


class TestMistakes:
    """Told before anything is queued, or as Slurm says it."""

    @pytest.mark.parametrize(
        ("option", "sentence"),
        [
            ("--sbatch=partition=nosuch", "invalid partition specified: nosuch"),
            ("--sbatch=account=nosuch", "Slurm refuses the train job"),
            ("--sbatch=gres=gpu:a100:1", "Slurm refuses the train job"),
        ],
    )
    def test_what_only_slurm_knows(
        self, launch: Launcher, shards: Path, tmp_path: Path, option: str, sentence: str
    ) -> None:
        result = launch(*training(shards, tmp_path / "run"), "--profile=local_cluster", option)
        check_sentence(result, sentence, program="cxr-launch")

    def test_what_the_profile_cannot_give(self, launch: Launcher, shards: Path, tmp_path: Path) -> None:
        result = launch(*training(shards, tmp_path / "run", "nodes=3"), "--profile=local_cluster")
        check_sentence(result, "resources.nodes=3 is more than the 2 of max_nodes", program="cxr-launch")
        assert not (tmp_path / "run").exists()

    def test_what_would_wait_for_ever(self, launch: Launcher, shards: Path, tmp_path: Path) -> None:
        (tmp_path / "cluster.yaml").write_text("shared_disks: true\n")
        told = training(shards, tmp_path / "run", "nodes=3", "batch_size=14")
        result = launch(*told, f"--profile={tmp_path / 'cluster.yaml'}")
        assert result.returncode == 0, result.stderr
        assert "may wait for ever, Slurm says PartitionNodeLimit" in result.stderr
        assert "cancelled" in launch("cancel", tmp_path / "run").stdout
        assert gone(launch.cluster)

    def test_a_job_that_vanished(self, launch: Launcher, shards: Path, tmp_path: Path) -> None:
        from launch.records import Record

        record = Record(tmp_path / "run/jobs/train-99999")
        record.submitted({"cluster": "slurm", "job": "99999"})
        record.begin("node1", 0, 0)
        status = launch("status", tmp_path / "run")
        assert status.returncode == 1
        assert "vanished" in status.stdout
        assert "submit the same again" in status.stdout
