"""What follows from what the ranks of a probe told: the lines of `cxr-launch doctor` on nodes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cxr_vae.console import counted
from launch.rank import VISIBLE_S

OK, WARN, FAIL = "ok", "warn", "FAIL"

CLOCK_S = 5.0
"""How far clocks may be apart."""

LOW_GB = 10
"""Free space that a run may soon have filled."""

Facts = dict[str, Any]

Report = Mapping[str, Facts]
"""Of one node, by what they are about: node, folder, torch, driver, network."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4} {self.text}{' → ' if self.remedy else ''}{self.remedy}"


@dataclass
class Words:
    """What the ranks told."""

    reports: dict[str, dict[str, Facts]] = field(default_factory=dict)
    together: dict[str, list[Facts]] = field(default_factory=lambda: {"gloo": [], "nccl": []})
    """Of every rank."""
    noise: list[str] = field(default_factory=list)
    """Lines of others: Slurm, Python, modules."""

    def take(self, lines: Iterable[str], seen: float) -> None:
        """Adds lines that came at a time of this machine."""
        for line in lines:
            try:
                facts = {**json.loads(line), "seen": seen}
                what, node = facts["what"], facts["node"]
            except (ValueError, TypeError, KeyError):
                self.noise += [line] if line.strip() else []
                continue
            if what in self.together:
                self.together[what].append(facts)
            else:
                self.reports.setdefault(node, {})[what] = facts

    def see_files(self, folder: Path, token: str) -> None:
        """Notes how late what each node wrote shows here."""
        waited_s = 0.0
        for facts in [report["folder"] for report in self.reports.values() if "folder" in report]:
            while "token" in facts and "visible_after" not in facts and waited_s < VISIBLE_S:
                if (folder / f"rank{facts['rank']}").read_text() == token:
                    facts["visible_after"] = waited_s
                else:
                    time.sleep(0.5)
                    waited_s += 0.5

    def last_noise(self, logs: Path) -> str:
        """The last thing that others said, in the ranks' words or in a log."""
        noise = [*(line for log in logs.glob("*.log") for line in log.read_text().splitlines()), *self.noise]
        return f" (it says: {noise[-1].strip()[:200]})" if noise else ""


def of_two_processes() -> Finding:
    """Two ranks on this machine."""
    from launch.starters import free_port

    call, ranks = [sys.executable, "-m", "launch.probe", "", "127.0.0.1", str(free_port()), "2"], []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        pipe, same = subprocess.PIPE, subprocess.STDOUT
        ranks.append(subprocess.Popen(call, env=os.environ | place, stdout=pipe, stderr=same, text=True))
    words = Words()
    for process in ranks:
        words.take(process.communicate()[0].splitlines(), time.time())
    gloo, nccl = (together_finding(what, words.together[what], 2) for what in ("gloo", "nccl"))
    return nccl if words.together["nccl"] and gloo.level == OK else gloo


def names(nodes: Sequence[str]) -> str:
    """`node1, node2 and 6 others`."""
    return ", ".join(nodes) if len(nodes) <= 4 else f"{', '.join(nodes[:2])} and {len(nodes) - 2} others"


def by_node(reports: Mapping[str, Report], check: Callable[[Report], Finding]) -> Iterator[Finding]:
    """One finding for all nodes with the same."""
    groups: dict[Finding, list[str]] = {}
    for node, report in reports.items():
        groups.setdefault(check(report), []).append(node)
    for finding, nodes in groups.items():
        yield replace(finding, text=f"{names(sorted(nodes))}: {finding.text}")


def torch_finding(torch: Facts, driver: Facts, wanted: int | None) -> Finding:
    """Whether torch can use as many GPUs as are wanted; None: all there are, but nothing is computed here."""
    if "error" in torch:
        return Finding(FAIL, f"torch and all of this can't be imported ({torch['error']})", "`pip install -e .` there")
    build = f"torch {torch['version']} for " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "CPUs only")
    seen, there = torch["gpus"], driver["gpus"]
    level = FAIL if wanted and not seen else WARN
    wanted = there if wanted is None else wanted
    gpus = f"{counted(there, 'GPU')} ({driver['name']})"
    if seen >= wanted:
        if seen and not torch["nccl"]:
            return Finding(WARN, f"{build} has no NCCL, through which GPUs talk", "install torch's CUDA build")
        return Finding(OK, f"{build}, {gpus if there else 'no GPU'}")
    if not there:
        return Finding(FAIL, f"{wanted} GPUs asked for, nvidia-smi sees none", "look at gpu_option in the profile")
    if not torch["cuda"]:
        return Finding(level, f"{gpus}, but {build}", "install torch's CUDA build: see pytorch.org/get-started")
    if driver["cuda"] and major(driver["cuda"]) < major(torch["cuda"]):
        remedy = f"update the driver, or install a torch for CUDA {major(driver['cuda'])}: see pytorch.org/get-started"
        return Finding(level, f"{gpus}, whose driver is too old (CUDA {driver['cuda']}) for {build}", remedy)
    return Finding(level, f"{gpus}, of which {build} sees {seen} ({torch['why']})", "let it see them, or ask for fewer")


def torch_of_node(report: Report, wanted: int) -> Finding:
    """The same of a node."""
    torch = report.get("torch", {"error": "no word of it", "gpus": 0})
    nothing = {"gpus": torch["gpus"], "name": "nvidia-smi told nothing", "cuda": None}
    return torch_finding(torch, report.get("driver", nothing), wanted)


def major(version: str) -> int:
    """13 of `13.2`."""
    return int(version.partition(".")[0])


def folder_finding(report: Report, folder: Path, token: str) -> Finding:
    """Whether a node sees what this machine writes, and this machine what the node writes."""
    facts = report.get("folder", {"error": "no word of it"})
    remedy = "take a folder that all machines see, in your home or project space, for runs and data"
    if facts.get("token") != token:
        return Finding(FAIL, f"{folder} is not there as it is here ({facts.get('error', 'other files')})", remedy)
    if "visible_after" not in facts:
        return Finding(FAIL, f"what it writes into {folder} does not show here", remedy)
    if not facts["locked"]:
        remedy = "never have two jobs on one run, or ask for a mount with locks"
        return Finding(WARN, f"{folder} has no locks that reach from machine to machine", remedy)
    late = f", {facts['visible_after']:.0f} s later" if facts["visible_after"] > CLOCK_S else ""
    return space_finding(f"sees {folder}, what it writes shows here{late}, locks hold,", facts["free_gb"])


def space_finding(what: str, free_gb: float) -> Finding:
    """Whether there is room."""
    low = free_gb < LOW_GB
    return Finding(WARN if low else OK, f"{what} {free_gb:.0f} GB free", "make room, or use another disk" * low)


def name_finding(report: Report) -> Finding:
    """Whether a node knows the first one's address."""
    facts = report.get("network", {})
    first = facts.get("first", "the first node")
    if not facts.get("its_ip"):
        return Finding(FAIL, f"can't look up {first}", "ask the administrators: nodes must know each other's names")
    return Finding(OK, f"finds {first} at {facts['its_ip']}")


def clock_finding(report: Report, waiting_at: float) -> Finding:
    """How far a node's clock is from this one's at the least: its word was said after `waiting_at`, before it came."""
    said, seen = report["node"]["time"], report["node"]["seen"]
    apart = max(said - seen, waiting_at - said, 0.0)
    if apart > CLOCK_S:
        which = "ahead of" if said > seen else "behind"
        return Finding(WARN, f"its clock is {apart:.0f} s or more {which} this one", "ask for NTP; times will mislead")
    return Finding(OK, "no difference of clocks to be seen")


def together_finding(what: str, answers: Sequence[Facts], num_ranks: int) -> Finding:
    """Whether the ranks could add up numbers, through `gloo` or `nccl`."""
    good = [facts for facts in answers if facts.get("together") == num_ranks]
    name = {"gloo": "gloo", "nccl": "NCCL"}[what]
    if len(good) == num_ranks:
        used = sorted({name for facts in good for name in facts.get("interfaces", [])})
        nodes = len({facts["node"] for facts in good})
        through = f" through {', '.join(used)}" if used else ""
        return Finding(OK, f"{name}: {num_ranks} ranks on {counted(nodes, 'node')} added up{through}")
    wrong = [facts for facts in answers if facts not in good]
    silent = num_ranks - len(answers)
    told = f"rank {wrong[0]['rank']} on {wrong[0]['node']}: {wrong[0].get('error', 'a wrong sum')}" if wrong else ""
    text = "; ".join(filter(None, [told, f"{silent} of {num_ranks} ranks gave no answer" * bool(silent)]))
    there = f"; it has {', '.join(wrong[0].get('interfaces', []))}" if wrong else ""
    export = f"export {what.upper()}_SOCKET_IFNAME=<interface that the nodes share>"
    return Finding(FAIL, f"{name}: {text}", f"try `{export}`, in the profile's setup{there}; or a firewall is between")
