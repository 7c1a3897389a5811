"""What `cxr-launch --dry-run` says would be submitted."""

import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import TINY
from tests.test_launch import launch, options


class TestDryRun:
    """Says what would be done, and does nothing."""

    def test_on_this_machine_it_prints_the_commands(self, source: Path, tmp_path: Path) -> None:
        result = launch("pipeline", *options(source, tmp_path, "prior.name=gmm"), "--dry-run")
        assert result.returncode == 0, result.stderr
        shard, train, prior, evaluate, report = result.stdout.splitlines()
        assert "--nproc-per-node=2 -m cxr_vae prior" in prior
        assert "prior.name=gmm prior.class_conditional=True prior.num_components=null" in prior
        assert "prior.name=gmm prior.num_steps=25" in evaluate
        assert f"{sys.executable} -m cxr_vae shard {source} {tmp_path / 'shards'} --image-size=32" in shard
        assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m cxr_vae train" in train
        assert "-m cxr_vae evaluate" in evaluate
        assert "evaluate.num_generated=20" in evaluate
        assert "data.split_file" not in prior + evaluate
        assert report.endswith(f"-m cxr_vae report {tmp_path / 'run'}")
        assert list(tmp_path.iterdir()) == []

    def test_later_stages_are_told_where_the_split_file_is_now(self, source: Path, tmp_path: Path) -> None:
        moved = f"data.split_file={tmp_path / 'moved.csv'}"
        result = launch("pipeline", *options(source, tmp_path, "prior.name=gmm", moved), "--dry-run")
        _, _, prior, evaluate, _ = result.stdout.splitlines()
        assert moved in prior
        assert moved in evaluate

    def test_for_slurm_it_prints_the_scripts_in_order(self, source: Path, tmp_path: Path) -> None:
        asked = ["prior.name=gmm", "nodes=2", "gpus_per_node=4", "processes_per_node=null", "memory_gb=64", "hours=2"]
        (tmp_path / "cluster.yaml").write_text(
            "max_nodes: 2\ngpus_per_node: 4\ncpus_per_node: 32\nqos: a\nsetup: [module load x]\n"
            "gpu_option: gres=gpu:a100:{gpus}\nshared_disks: true\nsrun: [--mpi=none]\n"
        )
        told = [*options(source, tmp_path, *asked), "--profile", tmp_path / "cluster.yaml"]
        once = [word for option in ("comment=x", "exclusive", "job-name=mine") for word in ("--sbatch", option)]
        result = launch("pipeline", *told, *once, "--dry-run", cluster="slurm")
        assert result.returncode == 0, result.stderr
        scripts = ["#!/bin/bash" + script for script in result.stdout.split("#!/bin/bash")[1:]]
        shard, train, prior, evaluate, report = scripts
        for script in scripts:
            assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
            for option in ("--qos=a", "--comment=x", "--exclusive", "--mem=64G", "--requeue", "--signal=USR2@120"):
                assert f"#SBATCH {option}\n" in script
            assert re.findall("--job-name=.*|wckey", script) == ["--job-name=mine"]
            assert "module load x\n" in script
            assert "--kill-on-bad-exit=1" in script
        for script, minutes in ((shard, 120), (train, 120), (prior, 120), (evaluate, 120), (report, 30)):
            assert f"#SBATCH --time={minutes}\n" in script
        assert "--nodes=1" in shard
        assert "gres" not in shard + report
        assert "--cpus-per-task=32" in shard  # one task with the cores of a machine's ranks
        for option in ("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:a100:4", "--cpus-per-task=8"):
            assert f"#SBATCH {option}\n" in train
        for option in ("--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8", "--mpi=none"):
            assert option in train.partition("#   srun ")[2]
        assert "afterok:<job id of shard>" in train
        assert "kill-on-invalid-dep=yes" in train
        assert "afterok:<job id of train>" in prior
        assert "afterok:<job id of prior>" in evaluate
        for script in (prior, evaluate):
            assert "#SBATCH --nodes=1\n" in script
            assert "#SBATCH --gres=gpu:a100:4\n" in script
        assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]

    def test_for_a_sweep_it_prints_the_array_and_the_table(self, shards: Path, tmp_path: Path) -> None:
        (tmp_path / "cluster.yaml").write_text("shared_disks: true")
        told = [
            "configs/reference.yaml",
            *TINY,
            f"data.shards={shards}",
            f"run_dir={tmp_path / 's'}",
            "lr=1e-3,1e-4,2e-4",
        ]
        result = launch("sweep", *told, "--profile", tmp_path / "cluster.yaml", "--dry-run", cluster="slurm")
        assert result.returncode == 0, result.stderr
        array, table = result.stdout.split("#!/bin/bash")[1:]
        assert "#SBATCH --array=0-2%3\n" in array
        assert f"#SBATCH --output={tmp_path}/s/logs/s-train-%A_%a-job.log\n" in array
        assert "dependency" not in array
        for rate in ("1e-3", "1e-4", "2e-4"):
            assert f"train {tmp_path}/s/lr={rate}/jobs/train.yaml\n" in array
        assert "afterany:<job id of the array>" in table
        assert table.rstrip().endswith(f" report {tmp_path / 's'}")
        assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]
