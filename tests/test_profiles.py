from pathlib import Path

import pytest

from cxr_vae.config import Config
from cxr_vae.config_file import load_config
from cxr_vae.errors import UserError
from launch.profiles import Profile, gpus_of, load_profile, minutes_of, sbatch_of, sbatch_options, shape_of
from launch.sweeps import combinations, grid_of, name_of

PROFILES = sorted(Path("configs/cluster").glob("*.yaml"))


def config(*options: str) -> Config:
    return load_config(None, options)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.name)
def test_every_profile_loads_and_says_what_it_needs(path: Path) -> None:
    profile = load_profile(str(path))
    assert profile == load_profile(path.stem)
    assert sbatch_options(config(), profile, gpus=profile.gpus_per_node) is not None  # what it says of GPUs can be said
    for word in ("Needs", "Run", "Expect"):
        assert f"# {word}" in path.read_text()


def test_what_the_configuration_leaves_open_comes_from_the_profile() -> None:
    profile = Profile(gpus_per_node=4, cpus_per_node=32, memory_gb=100, max_hours=12, partition="gpu")
    shape = shape_of(config("nodes=2"), profile, "x")
    assert (shape.nodes, shape.ranks_per_node, shape.cpus_per_rank) == (2, 4, 8)
    assert minutes_of(config(), profile) == 720
    assert sbatch_options(config(), profile, gpus=4) == {"partition": "gpu", "gpus-per-node": "4", "mem": "100G"}
    asked = config("gpus_per_node=2", "cpus_per_process=3", "memory_gb=7", "hours=0.5")
    assert shape_of(asked, profile, "x").cpus_per_rank == 3
    assert shape_of(asked, profile, "x").ranks_per_node == gpus_of(asked, profile) == 2
    assert minutes_of(asked, profile) == 30
    assert sbatch_options(asked, profile, gpus=0) == {"partition": "gpu", "mem": "7G"}


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("nodes=9", "resources.nodes=9 is more than the 8 of max_nodes"),
        ("gpus_per_node=5", "resources.gpus_per_node=5 is more than the 4 of gpus_per_node"),
        ("cpus_per_process=17", "x processes_per_node=68 is more than the 64 of cpus_per_node"),
        ("memory_gb=481", "resources.memory_gb=481 is more than the 480 of memory_gb"),
        ("hours=25", "resources.hours=25 is more than the 24 of max_hours"),
    ],
)
def test_what_it_cannot_give_is_refused_in_words(option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        shape_of(config(option), load_profile("gpu_modules"), "gpu_modules")


def test_mistakes_in_a_profile_are_told(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match=r"p\.yaml: unknown option partitoin: did you mean partition\?"):
        load_profile(str(path))
    path.write_text("max_nodes: many\n")
    with pytest.raises(UserError, match=r"p\.yaml: max_nodes='many' should be a valid integer"):
        load_profile(str(path))
    with pytest.raises(UserError, match=r"no such cluster profile; name a YAML file, or one of .*gpu_modules"):
        load_profile("nosuch")


def test_options_of_sbatch_for_once() -> None:
    asked = sbatch_of(["exclusive", "mem_per_gpu=4G", "comment=a=b"])
    assert asked == {"exclusive": True, "mem-per-gpu": "4G", "comment": "a=b"}
    for wrong in ("comment=", "=b", ""):
        with pytest.raises(UserError, match="write KEY=VALUE or KEY"):
            sbatch_of([wrong])


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("nodes=2", "set resources.nodes"),
        ("ntasks-per-node=2", "set resources.processes_per_node"),
        ("cpus_per_task=2", "set resources.cpus_per_process"),
        ("ntasks=8", "set resources.nodes and resources.processes_per_node"),
        ("gpus-per-node=4", "set resources.gpus_per_node"),
        ("gpus=4", "set resources.gpus_per_node"),
        ("time=60", "set resources.hours"),
        ("signal=USR1@60", "set signal_delay_s in the cluster profile"),
        ("output=log", "logs are in the run directory"),
        ("requeue", "by themselves"),
        ("no-requeue", "cxr-launch cancel"),
    ],
)
def test_options_of_sbatch_that_the_launcher_sets_are_refused(option: str, remedy: str, tmp_path: Path) -> None:
    key, _, value = option.partition("=")
    with pytest.raises(UserError, match=f"^--sbatch: {key.replace('_', '-')} is the launcher's own: .*{remedy}"):
        sbatch_of([option])
    (tmp_path / "p.yaml").write_text(f"sbatch:\n  {key}: {value or 'true'}\n")
    with pytest.raises(UserError, match=rf"^sbatch in \S*p\.yaml: {key} is the launcher's own: .*{remedy}"):
        load_profile(str(tmp_path / "p.yaml"))


def test_a_grid_is_every_combination() -> None:
    grid = grid_of(["lr=1e-3,1e-4", "model.channels=[8,16],[4]", "epochs=2"], None)
    runs = combinations(grid)
    assert runs[1] == ["lr=1e-3", "model.channels=[4]", "epochs=2"]
    assert len(runs) == 4
    assert [name_of(run, grid) for run in runs][:2] == ["lr=1e-3,model.channels=_8,16", "lr=1e-3,model.channels=_4"]
    assert len({name_of(run, grid) for run in runs}) == 4


def test_a_grid_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("lr: [1e-3, 0.0001]\nmodel.norm: [batch, group]\nmodel.channels: [[8, 16], [4]]\n")
    runs = combinations(grid_of([], path))
    assert len(runs) == 8
    for run in runs:
        load_config(None, run)
    path.write_text("lr: 1e-3\n")
    with pytest.raises(UserError, match="lr should hold a list of values"):
        grid_of([], path)


def test_a_sweep_of_one_run_is_none() -> None:
    with pytest.raises(UserError, match="several values"):
        grid_of(["lr=1e-3"], None)
