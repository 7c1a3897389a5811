"""slurm/local_cluster: a real Slurm whose nodes crash and come back."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import check_sentence, processes_with, wait_until
from tests.slurm_helpers import SlurmCluster, local_cluster


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with local_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def short_path() -> Iterator[Path]:
    """pytest's own are too long for the sockets of a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def marked(folder: Path) -> list[bytes]:
    """The environments of the processes that carry a cluster's mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"CXR_LOCAL_SLURM={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.read_bytes())
    return found


def node_state(cluster: SlurmCluster, node: str) -> str:
    return cluster.run("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T").strip()


def test_up_is_idempotent(slurm_cluster: SlurmCluster) -> None:
    before = len(marked(slurm_cluster.folder))
    again = slurm_cluster.control("up")
    assert again.stdout.startswith("up already\n"), again
    assert f'eval "$({Path(__file__).parents[1]}/slurm/local_cluster env --dir {slurm_cluster.folder})' in again.stdout
    assert len(marked(slurm_cluster.folder)) == before
    assert slurm_cluster.control("status").returncode == 0
    conf = slurm_cluster.folder / "etc/slurm.conf"
    assert slurm_cluster.control("env").stdout == f"export SLURM_CONF={conf}\n"


def test_each_node_has_its_own_name_and_knows_the_other(slurm_cluster: SlurmCluster) -> None:
    inside = "echo $(hostname) $(getent hosts node1 node2) $(env -u SLURM_CONF squeue --noheader --format=%N)"
    lines = slurm_cluster.run("srun", "--nodes=2", "bash", "-c", inside).splitlines()
    assert sorted(lines) == [f"{node} 127.0.1.11 node1 127.0.1.12 node2 node[1-2]" for node in ("node1", "node2")]
    assert "node1" not in Path("/etc/hosts").read_text()


def test_fake_gpus_are_handed_out(slurm_cluster: SlurmCluster) -> None:
    show = ("bash", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    lines = slurm_cluster.run("srun", "--nodes=2", "--gpus-per-node=2", *show).splitlines()
    assert sorted(lines) == ["node1 0,1", "node2 0,1"]


def test_sacct_knows_a_job_that_is_over(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.submit("exit 3", "--wait-all-nodes=1", "--output=/dev/null")
    options = ("--noheader", "--parsable2", "--allocations", "--format=state,exitcode,cluster")
    wait_until(lambda: slurm_cluster.run("sacct", f"--jobs={job}", *options) == "FAILED|3:0|cxr\n", every_s=0.5)


def test_what_is_mounted_later_is_seen_in_jobs(slurm_cluster: SlurmCluster) -> None:
    disk = slurm_cluster.folder / "shared/disk"
    disk.mkdir()
    slurm_cluster.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk))
    sizes = slurm_cluster.run("srun", "--nodes=2", "stat", "--file-system", "--format=%b", str(disk))
    assert sizes == "16\n16\n"


def test_a_crash_ends_all_on_the_node_and_it_comes_back(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    pause = f"98765.1{os.getpid()}"  # its processes are found by this argument
    script = f"srun --nodes=2 bash -c '(trap \"\" TERM; exec setsid sleep {pause}) & exec sleep {pause}'"
    job = slurm_cluster.submit(script, "--nodes=2", f"--output={tmp_path}/log")
    wait_until(lambda: len(processes_with(pause)) == 4)
    on_node2 = {process for process in processes_with(pause) if is_on("node2", process)}
    assert len(on_node2) == 2

    assert slurm_cluster.control("kill-node", "node2").returncode == 0
    assert not on_node2 & set(processes_with(pause))
    assert len(processes_with(pause)) == 2
    status = slurm_cluster.control("status")
    assert status.returncode == 1
    assert [line.split()[1] for line in status.stdout.splitlines()] == ["up", "up", "up", "up", "up", "down"]

    slurm_cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=crash")
    assert node_state(slurm_cluster, "node2").startswith("down")
    wait_until(lambda: slurm_cluster.state(job) == "PENDING")  # Slurm requeues by itself
    wait_until(lambda: not processes_with(pause))  # also what was detached on the node that is well
    slurm_cluster.run("scancel", job)

    started = slurm_cluster.control("start-node", "node2", SLURM_JOB_ID="1", SUBMITIT_EXECUTOR="slurm")
    assert started.returncode == 0, started.stderr
    assert node_state(slurm_cluster, "node2") == "idle"
    assert slurm_cluster.run("srun", "--nodelist=node2", "hostname") == "node2\n"
    assert not any(
        b"SUBMITIT_" in variables or b"SLURM_JOB_ID" in variables for variables in marked(slurm_cluster.folder)
    )
    assert slurm_cluster.control("status").returncode == 0


def is_on(node: str, process: int) -> bool:
    return f"SLURMD_NODENAME={node}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")


@pytest.mark.parametrize(("switch", "expected"), [("on", "USR2"), ("off", "TERM")])
def test_a_job_is_told_before_it_is_preempted(
    slurm_cluster: SlurmCluster, tmp_path: Path, switch: str, expected: str
) -> None:
    assert slurm_cluster.control("user-signal", switch).returncode == 0
    log = tmp_path / "log"
    task = "trap 'echo USR2; exit' USR2; trap 'echo TERM; exit' TERM; echo begins; while true; do sleep 0.1; done"
    (tmp_path / "task").write_text(task)
    options = ("--nodes=2", "--partition=low", "--signal=USR2@60", f"--output={log}")
    low = slurm_cluster.submit(f"srun bash {tmp_path}/task", *options)
    wait_until(lambda: log.exists() and log.read_text().count("begins\n") == 2)
    high = slurm_cluster.submit("true", "--nodes=2", "--exclusive", "--output=/dev/null")
    wait_until(lambda: log.read_text().count(f"{expected}\n") == 2)
    slurm_cluster.run("scancel", low, high)
    assert slurm_cluster.control("user-signal", "on").returncode == 0
    wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), every_s=0.5)


def test_the_controller_stops_and_starts(slurm_cluster: SlurmCluster) -> None:
    assert slurm_cluster.control("service", "stop", "slurmctld").returncode == 0
    assert "slurmctld  down\n" in slurm_cluster.control("status").stdout
    check_sentence(slurm_cluster.control("start-node", "node1"), "slurmctld is down", program="local_cluster")
    assert slurm_cluster.control("service", "start", "slurmctld").returncode == 0
    assert slurm_cluster.control("up").returncode == 0  # waits for the nodes
    assert slurm_cluster.run("srun", "hostname") == "node1\n"


def test_mistakes_are_told_in_one_sentence(slurm_cluster: SlurmCluster, short_path: Path) -> None:
    check_sentence(slurm_cluster.control("kill-node", "node3"), "'node3'", "node1", program="local_cluster")
    (short_path / "etc").mkdir()
    other = SlurmCluster(short_path, slurm_cluster.env)
    check_sentence(other.control("up"), str(short_path), "not empty", program="local_cluster")
    check_sentence(other.control("kill-node", "node1"), "no cluster is up", program="local_cluster")
    check_sentence(other.control("env"), "no cluster is up", program="local_cluster")
    assert other.control("down").returncode == 0
    assert (short_path / "etc").exists()
    port = (slurm_cluster.folder / "port_base").read_text().strip()
    new = SlurmCluster(short_path / "new", slurm_cluster.env)
    check_sentence(new.control("up", "--port-base", port), port, "not all free", program="local_cluster")
    deep = SlurmCluster(short_path / ("x" * 60), slurm_cluster.env)
    check_sentence(deep.control("up"), "at most 65 of the characters", program="local_cluster")


def test_down_ends_all_of_one_cluster_and_nothing_else(slurm_cluster: SlurmCluster, short_path: Path) -> None:
    pause = f"98765.2{os.getpid()}"
    with local_cluster(short_path) as second:
        own, other = second.submit(f"sleep {pause}", "--output=/dev/null"), marked(slurm_cluster.folder)
        wait_until(lambda: second.state(own) == "RUNNING" and processes_with(pause), every_s=0.5)
        start = time.monotonic()
        assert second.control("down").returncode == 0
        assert time.monotonic() - start < 30  # nothing had to be waited for
        assert not processes_with(pause)
        assert not marked(second.folder)
        assert str(second.folder) not in Path("/proc/self/mountinfo").read_text()
        assert (second.folder / "log/slurmctld.log").exists()
        assert sorted(marked(slurm_cluster.folder)) == sorted(other)
    assert slurm_cluster.control("status").returncode == 0
