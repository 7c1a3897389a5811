"""`cxr-launch doctor`: on this machine, and on a real Slurm."""

import subprocess
import sys
import uuid
from pathlib import Path

from tests.helpers import HANG_S, command, environment, wait_until
from tests.slurm_helpers import SlurmCluster


def examine(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """The exit code and the lines, each of which has a level, and a remedy unless it is ok."""
    call = command("cxr-launch", "doctor", *arguments)
    result = subprocess.run(call, env=env or environment(), capture_output=True, text=True, check=False, timeout=HANG_S)
    lines = result.stdout.splitlines()
    assert lines, result.stderr
    for line in lines:
        assert line.startswith(("ok   ", "warn ", "FAIL ")), line
        assert line.startswith("ok") or " → " in line or ": " in line, line
    assert result.returncode == any(line.startswith("FAIL") for line in lines), result.stderr
    return result.returncode, lines


def one_line(lines: list[str], *parts: str) -> str:
    """The only line that holds all of these."""
    found = [line for line in lines if all(part in line for part in parts)]
    assert len(found) == 1, lines
    return found[0]


def test_this_machine_alone(tmp_path: Path) -> None:
    code, lines = examine("--cluster", "local", "--folder", tmp_path / "runs")
    assert code == 0
    assert one_line(lines, "ok   Python 3.", sys.executable)
    assert one_line(lines, "ok   torch 2.")
    assert one_line(lines, f"{tmp_path}/runs has", "GB free")
    assert one_line(lines, "nception weights")
    assert one_line(lines, "ok   gloo: 2 ranks on 1 node added up through lo")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_do_not_reach_each_other() -> None:
    code, lines = examine("--cluster", "local", env=environment(GLOO_SOCKET_IFNAME="ib7"))
    assert code == 1
    line = one_line(lines, "FAIL gloo: rank 0 on ", "ib7", "→ try `export GLOO_SOCKET_IFNAME=")
    assert "lo 127.0.0.1" in line


def test_without_slurm_it_stops_there_and_says_what_to_do(tmp_path: Path) -> None:
    code, lines = examine("--cluster", "slurm", env=environment(PATH=str(tmp_path)))
    assert code == 1
    assert lines[-1].startswith("FAIL Slurm's commands are not on the PATH → run this on a login node")


def test_two_nodes_of_a_real_slurm(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    where = ("--cluster", "slurm", "--profile", "local_cluster", "--nodes", "2", "--folder", tmp_path / "runs")
    code, lines = examine(*where, env=slurm_cluster.env)
    assert code == 0, lines
    assert one_line(lines, "ok   Slurm's controller answers")
    assert one_line(lines, "ok   Slurm 2", "cluster cxr")
    assert one_line(lines, "ok   accounting answers")
    assert one_line(
        lines, "warn", "one that is cancelled has 25 s to save (KillWait)", "→ lower checkpoint.every_minutes"
    )
    assert one_line(lines, "ok   partition main is up, and so are 2 of its nodes with 16 CPUs, 4 GB and 0 GPUs or more")
    assert one_line(lines, "ok   jobs in main are not preempted by others")
    assert one_line(lines, "ok   node1, node2: Python 3.")
    assert one_line(lines, "ok   node1, node2: torch 2.")
    assert one_line(lines, f"ok   node1, node2: sees {tmp_path}/runs, what it writes shows here, locks hold, ")
    assert one_line(lines, "ok   node1, node2: no difference of clocks to be seen")
    assert one_line(lines, "ok   node1, node2: finds node1 at 127.0.1.11")
    assert lines[-1] == "ok   gloo: 2 ranks on 2 nodes added up through lo"
    assert list((tmp_path / "runs").iterdir()) == []
    wait_until(lambda: "cxr-doctor" not in slurm_cluster.run("squeue", "--noheader", "--format=%j"), every_s=0.5)


def test_a_folder_the_nodes_do_not_see_and_a_partition_that_is_preempted(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    profile = tmp_path / "low.yaml"
    profile.write_text("partition: low\nshared_disks: true\n")
    folder = Path("/dev/shm") / f"cxr-doctor-{uuid.uuid4().hex}"  # each node has its own
    try:
        code, lines = examine("--profile", profile, "--folder", folder, env=slurm_cluster.env)
    finally:
        leftovers = list(folder.iterdir())
        folder.rmdir()
    assert code == 1
    assert leftovers == []
    assert lines[-1].startswith("FAIL job ")
    assert f"→ do the nodes see {folder}? Name a folder with --folder that all machines see" in lines[-1]
    assert one_line(lines, "ok   jobs in low may be preempted by those of main, and come back by themselves")
    assert one_line(lines, "told by the signal they asked for", "have 45 s (GraceTime 20 s + KillWait 25 s)")
