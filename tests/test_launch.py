import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from cxr_vae.checkpoints.manifest import published
from cxr_vae.config_file import load_config
from tests.helpers import (
    HANG_S,
    TINY,
    check_saved_at_its_end,
    check_sentence,
    command,
    cxr_vae,
    environment,
    held_after,
    wait_until,
    with_patch,
)


def launch(*arguments: object, cluster: str = "inline", **variables: str) -> "subprocess.CompletedProcess[str]":
    return cxr_vae(*arguments, f"--cluster={cluster}", program="cxr-launch", **variables)


def ask(*arguments: object) -> str:
    return cxr_vae(*arguments, program="cxr-launch").stdout


def states(run: Path) -> dict[str, dict]:
    """By stage."""
    return {one["stage"]: one for one in json.loads(ask("status", run, "--json"))}


def options(source: Path, out: Path, *more: str) -> list[str]:
    return [
        *("configs/reference.yaml", *TINY, "epochs=2", "processes_per_node=2", "features=random", "num_generated=20"),
        *(f"data.source={source}", f"data.shards={out / 'shards'}", f"run_dir={out / 'run'}", *more),
    ]


def trainings(shards: Path, out: Path, *more: str) -> list[str]:
    return [
        *("configs/reference.yaml", *TINY, "processes_per_node=2", "checkpoint.every_steps=1000"),
        *(f"data.shards={shards}", f"run_dir={out / 'run'}", *more),
    ]


def num_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def processes_of(run: Path, what: str = "") -> list[psutil.Process]:
    """Those that have the run directory, and `what`, among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(run) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found += [process] if not what or what in words else []
    return found


RESIDUAL = ("model.name=residual", "model.latent_dim=null", "epochs=1", "prior.name=flow_matching")
GUIDED = ("prior.channels=[8, 16]", "prior.guide_channels=[8]", "prior.autoguidance=1.5", "prior.num_steps=2")
WITH_PRIOR = (*RESIDUAL, *GUIDED, "prior.batch_size=14", "train.precision=fp32")
"""A model of spatial latents with a prior that has a network: `cxr-vae prior` takes 5 steps an epoch."""


class TestInline:
    """On this terminal."""

    def test_a_pipeline_runs_every_stage_and_then_finds_it_done(self, source: Path, tmp_path: Path) -> None:
        run, told = tmp_path / "run", options(source, tmp_path, *WITH_PRIOR)
        first = launch("pipeline", *told, "prior.epochs=3")
        assert first.returncode == 0, first.stdout + first.stderr
        stages = [line for line in first.stdout.splitlines() if line.startswith("──")]
        assert stages == ["── shard ──", "── train ──", "── prior ──", "── evaluate ──", "── report ──"]
        assert "15 steps of 14 images (3 epochs of 70), 2 processes on cpu" in first.stdout
        for made in (
            "vae_final.safetensors",
            "priors/flow_matching.safetensors",
            "evaluation/evaluation_results.json",
            "samples/epoch_0001.png",
            "report.html",
        ):
            assert (run / made).is_file()
            assert made in first.stdout
        results = json.loads((run / "evaluation/evaluation_results.json").read_text())
        assert results["generated"]["prior"] == "flow_matching"
        assert (results["generated"]["num_steps"], results["generated"]["autoguidance"]) == (2, 1.5)
        known = states(run)
        assert [one["state"] for one in known.values()] == ["done"] * 5
        assert (known["train"]["step"], known["prior"]["step"], known["prior"]["checkpoint_step"]) == (5, 15, 15)
        before = (run / "vae_final.safetensors").read_bytes()
        told += ["processes_per_node=1"]
        again = launch("pipeline", *told, "prior.epochs=3")
        assert again.returncode == 0, again.stderr
        assert "going on from step-0000000005" in again.stdout
        assert "already fitted so" in again.stdout
        assert "already evaluated so" in again.stdout
        assert (run / "vae_final.safetensors").read_bytes() == before
        assert "fitted prior" in launch("prior", *told, "prior.epochs=4").stdout  # not what was saved in the run
        assert load_config(run / "config.yaml").prior.epochs == 3
        assert states(run)["prior"]["step"] == 20

    def test_it_stops_at_the_first_stage_that_fails(self, source: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(source, tmp_path / "source")
        for path in list((broken / "train" / "NORMAL").iterdir())[:10]:
            path.write_text("no image")
        result = launch("pipeline", *options(broken, tmp_path))
        assert result.returncode == 2
        assert "images can't be read" in result.stderr
        assert "── train ──" not in result.stdout
        assert "shard ended with exit code 2" in result.stderr
        assert not (tmp_path / "run" / "config.yaml").exists()
        assert states(tmp_path / "run")["shard"]["state"] == "failed"

    def test_ctrl_c_lets_the_training_save_and_the_same_command_goes_on(self, shards: Path, tmp_path: Path) -> None:
        call = command("cxr-launch", "train", *trainings(shards, tmp_path, "epochs=4000"), "--cluster=inline")
        process = subprocess.Popen(
            call, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        wait_until(lambda: num_lines(tmp_path / "run") > 20)
        os.killpg(process.pid, signal.SIGINT)  # to every process in the foreground, as a terminal does
        out, _ = process.communicate(timeout=HANG_S)
        assert process.returncode == 75
        saved = published(tmp_path / "run" / "checkpoints")
        step = int(saved[0].name.rpartition("-")[2])
        assert f"stopped after step {step} (SIGINT)" in out
        assert "start it again to go on" in out
        wait_until(lambda: not processes_of(tmp_path / "run"))
        longer = launch("train", *trainings(shards, tmp_path, f"epochs={step // 5 + 2}"))
        assert longer.returncode == 0, longer.stdout
        assert f"going on from {saved[0].name}" in longer.stdout

    def test_ctrl_c_ends_all_of_a_sweep(self, shards: Path, tmp_path: Path) -> None:
        told = trainings(shards, tmp_path, "processes_per_node=1", "epochs=4000", "lr=1e-3,1e-4")
        call = command("cxr-launch", "sweep", *told, "--cluster=inline")
        process = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        first, second = (tmp_path / f"run/lr={lr}" for lr in ("1e-3", "1e-4"))
        wait_until(lambda: num_lines(first) > 5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(HANG_S) == 75
        found = {one["run"]: one["state"] for one in json.loads(ask("status", tmp_path / "run", "--json"))}
        assert found == {str(first): "stopped", str(second): "cancelled", str(tmp_path / "run"): "cancelled"}

    def test_ctrl_c_while_it_shards_is_no_mistake(self, source: Path, tmp_path: Path) -> None:
        asleep = tmp_path / "asleep"
        code = (
            "import sys\n"
            "if 'cxr_vae' in sys.orig_argv:\n"
            "    import time, pathlib, cxr_vae.data.shards as shards\n"
            f"    shards.write_shards = lambda *_, **__: (pathlib.Path('{asleep}').touch(), time.sleep(600))\n"
        )
        call = command("cxr-launch", "shard", *options(source, tmp_path), "--cluster=inline")
        process = subprocess.Popen(
            call, env=with_patch(tmp_path, code), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_until(asleep.exists)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=HANG_S)
        assert "error: interrupted; the same command goes on" in out
        assert "start it again to go on" in out
        assert process.returncode == 75
        assert states(tmp_path / "run")["shard"]["state"] == "stopped"

    def test_a_killed_launcher_takes_its_ranks_along(self, shards: Path, tmp_path: Path) -> None:
        call = command("cxr-launch", "train", *trainings(shards, tmp_path, "epochs=4000"), "--cluster=inline")
        process = subprocess.Popen(call, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        wait_until(lambda: num_lines(tmp_path / "run") > 5)
        assert len(processes_of(tmp_path / "run")) > 3
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of(tmp_path / "run"))
        check_saved_at_its_end(tmp_path / "run")  # the ranks were asked, not killed


class TestLocal:
    """In the background of this machine."""

    def test_a_killed_rank_is_started_again_and_the_end_is_the_same(self, shards: Path, tmp_path: Path) -> None:
        run, told = tmp_path / "run", trainings(shards, tmp_path, "epochs=60", "checkpoint.every_steps=7")
        held, go = held_after(40, tmp_path)
        queued = launch("train", *told, cluster="local", PYTHONPATH=held["PYTHONPATH"])
        assert queued.returncode == 0, queued.stderr
        assert f"cxr-launch status {run}" in queued.stdout
        wait_until(lambda: num_lines(run) > 30)
        processes_of(run, "cxr_vae")[0].kill()
        running = states(run)["train"]  # with the next attempt under way
        assert (running["state"], running["num_steps"]) == ("running", 300)
        twice = launch("train", *told, cluster="local")
        check_sentence(twice, "has a train job already", f"cxr-launch cancel {run}", program="cxr-launch")
        go.touch()
        followed = ask("logs", run, "--follow")
        assert "trained weights:" in followed
        log = (run / "logs" / f"run-train-{socket.gethostname()}-rank0.log").read_text()
        assert log.count("steps of 14 images") == 2  # `logs` shows the last lines only
        assert f"run-train-job: ── train, attempt 2 on {socket.gethostname()}" in followed
        status = states(run)["train"]
        assert (status["state"], status["attempt"], status["step"]) == ("done", 2, 300)
        undisturbed = trainings(shards, tmp_path / "other", "epochs=60", "checkpoint.every_steps=7")
        assert launch("train", *undisturbed).returncode == 0
        assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "other/run/metrics.jsonl").read_bytes()

    def test_a_killed_rank_of_a_prior_is_started_again(self, trained: Path, shards: Path, tmp_path: Path) -> None:
        run = shutil.copytree(trained, tmp_path / "run")
        flow = ("prior.name=flow", "prior.width=8", "prior.batch_size=14", "prior.epochs=60", "epochs=2")
        told = trainings(shards, tmp_path, *flow, "checkpoint.every_steps=20")
        call = command("cxr-launch", "prior", *told, "--cluster=local")
        held, go = held_after(30, tmp_path)
        subprocess.run(call, env=held, stdout=subprocess.DEVNULL, check=True)
        wait_until(lambda: any(published(path) for path in run.glob("priors/*/checkpoints")))
        processes_of(run, "cxr_vae")[0].kill()
        go.touch()
        wait_until(lambda: states(run)["prior"]["state"] not in ("running", "waiting"), every_s=2)
        status = states(run)["prior"]
        assert (status["state"], status["attempt"], status["step"]) == ("done", 2, 300)
        log = (run / "logs" / f"run-prior-{socket.gethostname()}-rank0.log").read_text()
        assert "going on from step-" in log
        assert "fitted prior:" in log
        assert (run / "priors" / "flow.safetensors").is_file()

    def test_cancel_lets_it_save_and_ends_it(self, shards: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        launch("train", *trainings(shards, tmp_path, "epochs=4000"), cluster="local")
        wait_until(lambda: num_lines(run) > 5)
        assert "train job" in ask("cancel", run)
        wait_until(lambda: not processes_of(run))
        check_saved_at_its_end(run)
        assert states(run)["train"]["state"] == "cancelled"
        assert "nothing to cancel" in ask("cancel", run)

    def test_a_sweep_is_one_training_after_another_and_a_table(self, shards: Path, tmp_path: Path) -> None:
        told = trainings(shards, tmp_path, "processes_per_node=1", "epochs=1", "lr=1e-3,1e300")
        assert launch("sweep", *told, cluster="local").returncode == 0
        sweep = tmp_path / "run"
        wait_until(lambda: states(sweep)["report"]["state"] not in ("running", "waiting"), every_s=2)
        found = {one["run"]: one["state"] for one in json.loads(ask("status", sweep, "--json"))}
        assert found == {str(sweep / "lr=1e-3"): "done", str(sweep / "lr=1e300"): "failed", str(sweep): "done"}
        assert "lr=1e-3" in ask("logs", sweep, "--stage", "report")

    def test_a_bug_is_not_tried_for_ever(self, shards: Path, tmp_path: Path) -> None:
        code = (
            "import cxr_vae.losses.elbo as elbo\n"
            "def bug(*_): raise ZeroDivisionError('a bug')\n"
            "elbo.negative_elbo = bug\n"
        )
        told = trainings(shards, tmp_path, "processes_per_node=1")
        result = subprocess.run(
            command("cxr-launch", "train", *told, "--cluster=inline"),
            env=with_patch(tmp_path, code),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert result.stderr.count("ZeroDivisionError: a bug") == 2
        status = states(tmp_path / "run")["train"]
        assert (status["state"], status["attempt"]) == ("failed", 2)
        assert "2 times in a row without progress" in status["why"]
