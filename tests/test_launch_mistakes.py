"""Mistakes in what `cxr-launch` is asked for: one sentence, before anything is started."""

import subprocess
from pathlib import Path

import pytest

from cxr_vae.config_file import dump_config, load_config
from tests.helpers import (
    TINY,
    check_sentence,
    command,
    cxr_vae,
    environment,
)
from tests.test_launch import launch, options, trainings


class TestMistakes:
    """One sentence, exit code 2, before anything is started."""

    def test_a_typo(self, source: Path, tmp_path: Path) -> None:
        result = launch("pipeline", *options(source, tmp_path, "epoch=3"))
        check_sentence(result, "did you mean train.epochs or prior.epochs?", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_slurm_where_there_is_none(self, shards: Path, tmp_path: Path) -> None:
        (tmp_path / "cluster.yaml").write_text("shared_disks: true")
        where = ["--cluster=slurm", f"--profile={tmp_path / 'cluster.yaml'}"]
        told = ["configs/reference.yaml", *TINY, f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", *where]
        result = subprocess.run(
            command("cxr-launch", "train", *told),
            env=environment(PATH="/nowhere"),
            capture_output=True,
            text=True,
            check=False,
        )
        check_sentence(result, "no Slurm controller answers", program="cxr-launch")

    def test_a_run_on_a_disk_the_nodes_do_not_see(self, shards: Path) -> None:
        told = ["configs/reference.yaml", f"data.shards={shards}", "run_dir=/dev/shm/run"]
        result = launch("train", *told, cluster="slurm")
        check_sentence(result, "/dev/shm/run is on a disk of this machine only", "shared_disks", program="cxr-launch")

    def test_several_nodes_on_one_machine(self, source: Path, tmp_path: Path) -> None:
        result = launch("train", *options(source, tmp_path, "nodes=2"))
        check_sentence(result, "resources.nodes=2", "--cluster slurm", program="cxr-launch")

    def test_a_pipeline_that_would_lack_the_inception_weights_at_its_end(self, source: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            command("cxr-launch", "pipeline", *options(source, tmp_path, "features=inception"), "--cluster=inline"),
            env=environment(TORCH_HOME=str(tmp_path / "cache")),
            capture_output=True,
            text=True,
            check=False,
        )
        check_sentence(result, "cxr-vae fetch-weights", "features=random", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_a_source_that_is_not_there(self, source: Path, tmp_path: Path) -> None:
        result = launch("pipeline", *options(source / "nowhere", tmp_path))
        check_sentence(result, f"data.source={source / 'nowhere'} is no folder here", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_a_pipeline_that_could_not_compile(self, source: Path, tmp_path: Path) -> None:
        call = command("cxr-launch", "pipeline", *options(source, tmp_path, "compile=default"), "--cluster=inline")
        nothing = environment(PATH="/nowhere", CXX="")
        result = subprocess.run(call, env=nothing, capture_output=True, text=True, check=False)
        check_sentence(result, "train.compile=default needs a C++ compiler", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_nothing_to_shard(self, tmp_path: Path) -> None:
        result = launch("pipeline", "configs/reference.yaml", f"data.shards={tmp_path}", f"run_dir={tmp_path / 'r'}")
        check_sentence(result, "data.source is not set", program="cxr-launch")

    def test_no_shards_to_train_on(self, tmp_path: Path) -> None:
        result = launch("train", "configs/reference.yaml", f"data.shards={tmp_path}", f"run_dir={tmp_path / 'r'}")
        check_sentence(result, "holds no shards", "cxr-launch shard", program="cxr-launch")

    def test_a_batch_too_small_for_its_ranks(self, shards: Path, tmp_path: Path) -> None:
        result = launch("train", *trainings(shards, tmp_path, "batch_size=2", "processes_per_node=4"))
        check_sentence(result, "less than one image for each of 4 processes", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_an_evaluation_without_weights(self, shards: Path, tmp_path: Path) -> None:
        result = launch("evaluate", *trainings(shards, tmp_path))
        check_sentence(result, "no trained weights", program="cxr-launch")

    def test_a_prior_for_other_latents(self, source: Path, tmp_path: Path) -> None:
        result = launch("pipeline", *options(source, tmp_path, "prior.name=flow_matching"))
        check_sentence(result, "is for spatial latents", program="cxr-launch")
        assert list(tmp_path.iterdir()) == []

    def test_a_prior_that_nothing_has_fitted(self, trained: Path, shards: Path) -> None:
        told = trainings(shards, trained.parent, "epochs=2", "features=random")
        result = launch("evaluate", *told, "prior.name=gmm")
        check_sentence(result, "has no gmm prior yet", "cxr-launch prior", program="cxr-launch")
        check_sentence(launch("prior", *told), "prior.name=standard has nothing to fit", program="cxr-launch")

    def test_a_run_of_another_configuration(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        config = load_config("configs/reference.yaml", [*TINY, "latent_dim=9"])
        (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
        result = launch("train", *options(source, tmp_path))
        check_sentence(result, "model.latent_dim: 9 → 4", program="cxr-launch")

    @pytest.mark.parametrize("name", ["status", "logs", "cancel"])
    def test_no_run(self, tmp_path: Path, name: str) -> None:
        result = cxr_vae(name, tmp_path, program="cxr-launch")
        check_sentence(result, f"no run in {tmp_path}", program="cxr-launch")
