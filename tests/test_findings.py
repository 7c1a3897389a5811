"""The doctor's reading of what Slurm, nvidia-smi and nodes print."""

from pathlib import Path

import pytest

from launch import doctor, probe, slurm_findings
from launch.findings import (
    FAIL,
    OK,
    WARN,
    Finding,
    Words,
    by_node,
    clock_finding,
    folder_finding,
    name_finding,
    together_finding,
    torch_finding,
    torch_of_node,
)
from launch.profiles import Profile

# Lines of `scontrol show config` of Slurm 22.05.8, spaces as they are there.
CONFIG = """\
Configuration data as of 2026-11-22T21:06:53
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = cxr
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PreemptExemptTime       = 00:00:00
SlurmctldHost[0]        = controller(127.0.0.1)
SlurmctldParameters     = (null)
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at controller is UP
"""

# Of `scontrol show partition --oneliner`.
PARTITIONS = """\
PartitionName=main AllowGroups=ALL Default=YES QoS=N/A GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED \
Nodes=node[1-2] PriorityTier=10 PreemptMode=REQUEUE State=UP TotalNodes=2 TRES=cpu=32,mem=16000M,node=2,gres/gpu=4
PartitionName=low AllowGroups=ALL Default=NO QoS=N/A GraceTime=20 MaxNodes=1 MaxTime=1-00:00:00 \
Nodes=node[1-2] PriorityTier=1 PreemptMode=REQUEUE State=UP TotalNodes=2 TRES=cpu=32,mem=16000M,node=2,gres/gpu=4
"""

NODES = "node1|16|8000|gpu:2|idle\nnode2|16|8000|gpu:2|mixed\nnode3|8|4000|(null)|idle\n"

SMI_LIST = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5a3c)
  MIG 1g.5gb      Device  0: (UUID: MIG-1)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-7b11)
"""
SMI_TABLE = "| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |"


class TestWhatSlurmPrints:
    config = slurm_findings.fields_of(CONFIG)
    partitions = slurm_findings.records_of(PARTITIONS)

    def preemption(self, partition: str, **changed: str) -> list[Finding]:
        partitions = {**self.partitions, partition: self.partitions[partition] | changed}
        return list(slurm_findings.preemption(self.config, partitions[partition], partitions, {}, None))

    def test_the_configuration(self) -> None:
        assert self.config["KillWait"] == "30 sec"
        assert self.config["PreemptType"] == "preempt/partition_prio"
        assert slurm_findings.ending_finding(self.config).level == OK

    def test_preempt_send_user_signal_missing(self) -> None:
        who, told = self.preemption("low")
        assert who == Finding(
            OK, "jobs in low may be preempted by those of main, and come back by themselves (PreemptMode=REQUEUE)"
        )
        assert told.text == (
            "preempt_send_user_signal is not set: preempted jobs are told by SIGTERM, on which training saves too, "
            "and have 50 s (GraceTime 20 s + KillWait 30 s)"
        )
        assert told.level == OK
        asked = slurm_findings.notice_finding({**self.config, "SlurmctldParameters": "a,preempt_send_user_signal"}, 0.0)
        assert asked.text.startswith("preempted jobs are told by the signal they asked for (preempt_send_user_signal)")
        short = slurm_findings.notice_finding({"KillWait": "5 sec"}, 0.0)
        assert short.level == WARN
        assert "checkpoint.every_minutes" in short.remedy

    def test_preempted_jobs_that_do_not_come_back(self) -> None:
        assert self.preemption("low", PreemptMode="CANCEL")[0].level == WARN
        assert "suspended" in self.preemption("low", PreemptMode="SUSPEND")[0].text
        for spared in (self.preemption("low", PreemptMode="OFF"), self.preemption("main")):
            assert [finding.text.partition(" are ")[2] for finding in spared] == ["not preempted by others"]

    def test_preemption_by_quality_of_service(self) -> None:
        config = {**self.config, "PreemptType": "preempt/qos"}
        qos = {"normal": ["scavenger", "cluster", "00:00:00"], "scavenger": ["", "cancel", "00:01:00"]}

        def told(mine: str | None) -> list[Finding]:
            return list(slurm_findings.preemption(config, self.partitions["main"], self.partitions, qos, mine))

        assert "name it in the profile" in told(None)[0].text
        assert "not preempted" in told("normal")[0].text
        assert "by those of normal, and are then cancelled (PreemptMode=CANCEL)" in told("scavenger")[0].text
        assert "90 s (GraceTime 60 s" in told("scavenger")[1].text

    def limits(self, profile: Profile, nodes: int, partition: str = "main", **changed: str) -> list[str]:
        return [str(one) for one in slurm_findings.limits(profile, nodes, self.partitions[partition] | changed, NODES)]

    def test_limits(self) -> None:
        large = Profile(cpus_per_node=16, gpus_per_node=2, memory_gb=4, max_nodes=2)
        assert self.limits(large, 2) == [
            "ok   partition main is up, and so are 2 of its nodes with 16 CPUs, 4 GB and 2 GPUs or more"
        ]
        assert self.limits(large, 3)[0].startswith("FAIL partition main gives a job 2 of its nodes with 16 CPUs")
        assert self.limits(large, 1, "low")[1].startswith("warn max_nodes is 2, but partition low gives 1 → ")
        assert self.limits(large, 2, State="DOWN")[0].startswith("FAIL partition main is DOWN → ")
        assert self.limits(Profile(max_hours=48), 1, "low")[1] == (
            "FAIL jobs ask for 48 hours unless told otherwise, partition low allows 24 "
            "→ set max_hours: 24 in the profile"
        )

    def test_nodes_that_are_down(self) -> None:
        listed = NODES.replace("mixed", "drained*")
        found = [
            str(one) for one in slurm_findings.limits(Profile(cpus_per_node=16), 2, self.partitions["main"], listed)
        ]
        assert found[0].startswith("warn of the 2 nodes of partition main with 16 CPUs, 0 GB and 0 GPUs only 1 are up")

    @pytest.mark.parametrize(
        ("gres", "number"),
        [("gpu:2", 2), ("gpu:a100:4(S:0-1)", 4), ("shard:8,gpu:a100:4(S:0),gpu:1", 5), ("(null)", 0)],
    )
    def test_gres(self, gres: str, number: int) -> None:
        assert slurm_findings.gpus_in(gres) == number

    def test_accounts(self) -> None:
        mine = "physics|normal,high\nchest|normal\n"
        assert slurm_findings.account_finding(Profile(account="chest", qos="high"), mine, {}).level == OK
        assert slurm_findings.account_finding(Profile(account="chests"), None, {}).level == OK
        wrong = slurm_findings.account_finding(
            Profile(account="chests"), mine, {"AccountingStorageEnforce": "associations"}
        )
        assert wrong.level == FAIL
        assert wrong.text == "account 'chests' is not among yours (account: chest, physics; qos: high, normal)"
        assert slurm_findings.account_finding(Profile(qos="low"), mine, self.config).level == WARN


DRIVER = probe.read_smi(SMI_LIST, SMI_TABLE)
TORCH = {"version": "2.15.0", "cuda": "12.6", "gpus": 2, "why": "", "nccl": True}


class TestGpus:
    """Of a machine with two, as nvidia-smi prints them."""

    def test_what_nvidia_smi_prints(self) -> None:
        assert DRIVER == {"gpus": 2, "name": "NVIDIA A100-SXM4-40GB", "cuda": "12.4"}
        assert probe.read_smi("", "") == {"gpus": 0, "name": "", "cuda": None}
        found = torch_finding(TORCH, DRIVER, 2)
        assert str(found) == "ok   torch 2.15.0 for CUDA 12.6, 2 GPUs (NVIDIA A100-SXM4-40GB)"

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"cuda": None, "gpus": 0}, "but torch 2.15.0 for CPUs only → install torch's CUDA build"),
            ({"cuda": "13.2", "gpus": 0}, "driver is too old (CUDA 12.4) for torch 2.15.0 for CUDA 13.2 → update"),
            ({"gpus": 0, "why": "CUDA_VISIBLE_DEVICES: "}, "sees 0 (CUDA_VISIBLE_DEVICES: ) → let it see them"),
        ],
    )
    def test_gpus_that_torch_can_not_use(self, changed: dict[str, object], words: str) -> None:
        torch = TORCH | changed
        assert words in str(torch_finding(torch, DRIVER, 2))
        assert torch_finding(torch, DRIVER, 2).level == FAIL
        assert torch_finding(torch, DRIVER, None).level == WARN  # a login node: jobs run elsewhere
        assert torch_finding(torch, DRIVER, 0).level == OK

    def test_no_nccl_and_no_gpu_where_some_are_asked_for(self) -> None:
        assert "no NCCL" in torch_finding(TORCH | {"nccl": False}, DRIVER, 2).text
        none = torch_finding(TORCH | {"gpus": 0}, probe.read_smi("", ""), 4)
        assert str(none).startswith("FAIL 4 GPUs asked for, nvidia-smi sees none → look at gpu_option")

    def test_a_rank_that_died_in_nvidia_smi(self) -> None:
        found = torch_of_node({"torch": TORCH | {"gpus": 0}}, 2)
        assert str(found).startswith("FAIL 2 GPUs asked for, nvidia-smi sees none")
        found = torch_of_node({"torch": TORCH}, 2)
        assert str(found) == "ok   torch 2.15.0 for CUDA 12.6, 2 GPUs (nvidia-smi told nothing)"
        assert torch_of_node({}, 2).level == "FAIL"


class TestWhatNodesTell:
    def test_nodes_that_differ_have_a_line_each(self) -> None:
        words = Words()
        lines = [f'{{"rank": {n}, "node": "node{n}", "what": "node", "python": "3.11", "time": 0}}' for n in range(6)]
        words.take([*lines[:5], lines[5].replace("3.11", "3.9"), "srun: error: a nuisance", ""], seen=1.0)
        found = by_node(words.reports, lambda one: Finding(OK, one["node"]["python"]))
        assert [finding.text for finding in found] == ["node0, node1 and 3 others: 3.11", "node5: 3.9"]
        assert words.last_noise(Path("no logs")) == " (it says: srun: error: a nuisance)"

    def test_clocks(self) -> None:
        def level(said: float) -> str:
            return clock_finding({"node": {"time": said, "seen": 1010.0}}, waiting_at=1000.0).level

        assert [level(said) for said in (990, 999, 1005, 1012, 1020)] == [WARN, OK, OK, OK, WARN]
        behind = clock_finding({"node": {"time": 900.0, "seen": 1010.0}}, waiting_at=1000.0)
        assert behind.text == "its clock is 100 s or more behind this one"

    def test_folders(self, tmp_path: Path) -> None:
        good = {"token": "a", "visible_after": 0.0, "locked": True, "free_gb": 99.0}

        def finding(**facts: object) -> str:
            return str(folder_finding({"folder": good | facts}, tmp_path, "a"))

        assert finding() == f"ok   sees {tmp_path}, what it writes shows here, locks hold, 99 GB free"
        assert finding(token="b").startswith(f"FAIL {tmp_path} is not there as it is here (other files) → take")
        assert finding(locked=False).startswith("warn")
        assert finding(free_gb=2.0).startswith("warn")
        assert "8 s later" in finding(visible_after=8.0)
        del good["visible_after"]
        assert finding().startswith("FAIL what it writes")

    def test_files_are_looked_at_until_the_node_has_replaced_them(self, tmp_path: Path) -> None:
        (tmp_path / "rank0").write_text("a")
        (tmp_path / "rank1").write_text("to be replaced")
        facts = [{"token": "a", "rank": 0}, {"error": "No such file", "rank": 1}]
        words = Words({f"node{number}": {"folder": one} for number, one in enumerate(facts)})
        words.see_files(tmp_path, "a")
        assert ["visible_after" in one for one in facts] == [True, False]

    def test_ranks_that_do_not_answer(self) -> None:
        good = {"rank": 0, "node": "node1", "together": 2.0, "interfaces": ["ib0"]}
        assert together_finding("nccl", [good, good | {"rank": 1, "node": "node2"}], 2) == Finding(
            OK, "NCCL: 2 ranks on 2 nodes added up through ib0"
        )
        silent = together_finding("nccl", [good], 2)
        assert silent.text == "NCCL: 1 of 2 ranks gave no answer"
        assert "NCCL_SOCKET_IFNAME" in silent.remedy

    def test_an_unknown_name(self) -> None:
        assert probe.look_up("no-such-machine.invalid") == ""
        assert name_finding({"network": {"first": "node1", "its_ip": ""}}).level == FAIL


def test_uncommitted_changes() -> None:
    revision = "3f91bb5" + 33 * "0"
    assert doctor.code_finding(f"{revision}-dirty").level == WARN
    assert doctor.code_finding(revision).level == OK
