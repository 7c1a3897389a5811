import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cxr_vae.checkpoint import published
from cxr_vae.config_file import load_config
from tests.helpers import TINY, check_sentence, command, cxr_vae, environment


def launch(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return cxr_vae(*arguments, program="cxr-launch")


def options(source: Path, out: Path, *more: str) -> list[str]:
    return [
        *("configs/reference.yaml", *TINY, "epochs=2", "processes_per_node=2", "features=random", "num_generated=20"),
        *(f"data.source={source}", f"data.shards={out / 'shards'}", f"run_dir={out / 'run'}", *more),
    ]


def test_pipeline_on_this_machine_runs_every_stage_and_then_finds_it_done(source: Path, tmp_path: Path) -> None:
    first = launch("pipeline", *options(source, tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    stages = [line for line in first.stdout.splitlines() if line.startswith("──")]
    assert stages == ["── shard ──", "── train ──", "── evaluate ──", "── summary ──"]
    assert "2 processes on cpu" in first.stdout
    assert "submitit" not in first.stdout
    for made in ("vae_final.safetensors", "evaluation/evaluation_results.json", "samples/epoch_0002.png"):
        assert (tmp_path / "run" / made).is_file()
        assert made in first.stdout or made.startswith("evaluation")
    before = (tmp_path / "run" / "vae_final.safetensors").read_bytes()
    again = launch("pipeline", *options(source, tmp_path))
    assert again.returncode == 0, again.stderr
    assert "going on from step-0000000010" in again.stdout
    assert "already evaluated so" in again.stdout
    assert (tmp_path / "run" / "vae_final.safetensors").read_bytes() == before


def test_pipeline_stops_at_the_first_stage_that_fails(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "source")
    for path in list((broken / "train" / "NORMAL").iterdir())[:10]:
        path.write_text("no image")
    result = launch("pipeline", *options(broken, tmp_path))
    assert result.returncode == 2
    assert "images can't be read" in result.stdout
    assert "── train ──" not in result.stdout
    assert "shard ended with exit code 2; its log: " in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ctrl_c_lets_the_training_save_and_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    call = command("cxr-launch", "pipeline", *options(source, tmp_path, "epochs=400", "checkpoint.every_steps=1000"))
    process = subprocess.Popen(
        call, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 20)
    os.killpg(process.pid, signal.SIGINT)  # to every process in the foreground, as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted" in out
    saved = published(tmp_path / "run" / "checkpoints")
    step = int(saved[0].name.rpartition("-")[2])
    assert f"stopped after step {step} (SIGINT)" in out
    wait_until(lambda: not processes_of(process.pid))
    longer = launch("pipeline", *options(source, tmp_path, f"epochs={step // 5 + 2}"))
    assert longer.returncode == 0, longer.stdout
    assert f"going on from {saved[0].name}" in longer.stdout


def test_a_killed_launcher_takes_its_jobs_along(source: Path, tmp_path: Path) -> None:
    call = command("cxr-launch", "pipeline", *options(source, tmp_path, "epochs=400", "checkpoint.every_steps=1000"))
    process = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
    assert len(processes_of(process.pid)) > 3
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(process.pid))
    assert list((tmp_path / "run" / "checkpoints").iterdir())  # the ranks were asked, not killed


def wait_until(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.05)


def processes_of(session: int) -> list[int]:
    """The living processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_dry_run_prints_the_commands_and_starts_nothing(source: Path, tmp_path: Path) -> None:
    result = launch("pipeline", *options(source, tmp_path), "--dry-run")
    assert result.returncode == 0, result.stderr
    shard, train, evaluate = result.stdout.splitlines()
    assert f"{sys.executable} -m cxr_vae shard {source} {tmp_path / 'shards'} --image-size=32" in shard
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m cxr_vae train" in train
    assert "-m cxr_vae evaluate" in evaluate
    assert "evaluate.num_generated=20" in evaluate
    assert list(tmp_path.iterdir()) == []


def test_slurm_dry_run_prints_the_sbatch_scripts_in_order(source: Path, tmp_path: Path) -> None:
    asked = ["nodes=2", "gpus_per_node=4", "processes_per_node=null", "cpus_per_process=8", "memory_gb=64", "hours=2"]
    result = launch(
        "pipeline", *options(source, tmp_path, *asked), "--cluster", "slurm", "--dry-run", "--sbatch", "qos=a"
    )
    assert result.returncode == 0, result.stderr
    shard, train, evaluate = ("#!/bin/bash" + script for script in result.stdout.split("#!/bin/bash")[1:])
    for script in (shard, train, evaluate):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        assert "#SBATCH --qos=a" in script
        assert "#SBATCH --time=120" in script
        assert "--kill-on-bad-exit=1" in script
    assert "--nodes=1" in shard
    assert "--gpus-per-node" not in shard
    assert "--cpus-per-task=32" in shard  # one task with the cores of a machine's ranks
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=64GB"):
        assert f"#SBATCH {option}\n" in train
    assert "afterok:<job id of shard>" in train
    assert "kill-on-invalid-dep=yes" in train
    assert "afterok:<job id of train>" in evaluate
    assert "#SBATCH --nodes=1" in evaluate
    assert list(tmp_path.iterdir()) == []


class TestMistakes:
    """One sentence, exit code 2, before anything is started."""

    def test_a_typo(self, source: Path, tmp_path: Path) -> None:
        result = launch("pipeline", *options(source, tmp_path, "epoch=3"))
        check_sentence(result, "did you mean train.epochs?", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_slurm_where_there_is_none(self, source: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            command("cxr-launch", "train", *options(source, tmp_path), "--cluster", "slurm"),
            env=environment(PATH=str(tmp_path)),
            capture_output=True,
            text=True,
            check=False,
        )
        check_sentence(result, "no sbatch on this machine", program="cxr-launch")

    def test_several_nodes_on_one_machine(self, source: Path, tmp_path: Path) -> None:
        result = launch("train", *options(source, tmp_path, "nodes=2"))
        check_sentence(result, "resources.nodes=2", "--cluster slurm", program="cxr-launch")

    def test_a_pipeline_that_would_lack_the_inception_weights_at_its_end(self, source: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            command("cxr-launch", "pipeline", *options(source, tmp_path, "features=inception")),
            env=environment(TORCH_HOME=str(tmp_path / "cache")),
            capture_output=True,
            text=True,
            check=False,
        )
        check_sentence(result, "cxr-vae fetch-weights", "features=random", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_to_shard(self, tmp_path: Path) -> None:
        result = launch("pipeline", "configs/reference.yaml", f"data.shards={tmp_path}", f"run_dir={tmp_path / 'r'}")
        check_sentence(result, "data.source is not set", program="cxr-launch")

    def test_a_run_of_another_configuration(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        config = load_config("configs/reference.yaml", [*TINY, "latent_dim=9"])
        from cxr_vae.config_file import dump_config

        (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
        result = launch("train", *options(source, tmp_path))
        check_sentence(result, "model.latent_dim: 9 → 4", program="cxr-launch")
