"""A look at the nodes: a short job whose ranks tell what they see there, and what follows from that.

Until a rank has told what it can import it needs the standard library alone: what is missing is what we want to hear.
"""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import slurm_commands
from launch.rank import VISIBLE_S, identity

OK, WARN, FAIL = "ok", "warn", "FAIL"

PATIENCE_S = 60
"""How long a rank waits for the others, which may still read torch from a slow disk."""

LIMIT_S = 150
"""Of a whole rank."""

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


def main(arguments: list[str]) -> int:
    """`FOLDER ADDRESS PORT RANKS_PER_NODE`: prints what this rank sees, a line of JSON a fact.

    Without a folder, only how it gets on with the other ranks.
    """
    folder, address, port, local_size = arguments
    signal.alarm(LIMIT_S)  # nothing else ends a process that hangs in a library
    os.environ |= identity() | {"MASTER_ADDR": address, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": local_size}
    if folder and os.environ["LOCAL_RANK"] == "0":
        tell("node", python=platform.python_version(), time=time.time())
        tell("folder", **look_at_folder(Path(folder), os.environ["RANK"]))
        tell("torch", **look_at_torch())
        tell("driver", **look_at_driver())
        tell("network", first=address, its_ip=look_up(address))
    add_up()
    sys.stdout.flush()
    os._exit(0)  # an orderly end would wait for others that may be gone


def tell(what: str, **facts: Any) -> None:
    """One short line, which srun passes on whole."""
    who = {"rank": int(os.environ["RANK"]), "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname()}
    print(json.dumps(who | {"what": what} | facts), flush=True)


def sentence(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def look_at_folder(folder: Path, rank: str) -> dict[str, Any]:
    """Whether the doctor's folder is the same here; leaves the token for the doctor to see."""
    try:
        import shutil

        from cxr_vae.files import write_atomically

        token = (folder / "token").read_text()
        write_atomically(folder / f"rank{rank}", token)
        return {"token": token, "free_gb": shutil.disk_usage(folder).free / 1e9, "locked": is_locked(folder)}
    except (ImportError, OSError) as error:
        return {"error": sentence(error)}


def is_locked(folder: Path) -> bool:
    """Whether a run directory that another machine holds is seen as held."""
    from cxr_vae.errors import UserError
    from cxr_vae.locks import DirectoryLock

    try:
        DirectoryLock(folder, wait_s=0).release()
    except UserError:
        return True
    return False


def look_at_torch() -> dict[str, Any]:
    """The build of torch, and the GPUs it can use."""
    try:
        import torch
        import torch.distributed

        import cxr_vae.evaluation.evaluate
        import cxr_vae.training.train  # noqa: F401  # with all that they need
    except Exception as error:
        return {"error": sentence(error)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = f"CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"
    why = " ".join(str(caught[0].message).split())[:200] if caught and not gpus else visible
    nccl = torch.distributed.is_nccl_available()
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus, "why": why, "nccl": nccl}


def look_at_driver() -> dict[str, Any]:
    """The GPUs of this machine, whether or not torch can use them."""
    return read_smi(slurm_commands.ask("nvidia-smi", "-L") or "", slurm_commands.ask("nvidia-smi") or "")


def read_smi(listed: str, table: str) -> dict[str, Any]:
    """From `nvidia-smi -L` and `nvidia-smi`: the number and name of the GPUs, and the newest CUDA of the driver."""
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.MULTILINE)
    cuda = re.search(r"CUDA Version: *(\d+\.\d+)", table)
    return {"gpus": len(names), "name": names[0] if names else "", "cuda": cuda[1] if cuda else None}


def look_up(name: str) -> str:
    """The IPv4 address of a machine; empty where it isn't known here."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return ""


def add_up() -> None:
    """All ranks add up numbers as training does, over gloo and, where each has a GPU, over NCCL."""
    what = "gloo"
    try:
        import torch

        from cxr_vae.distributed import world

        with world("auto", timedelta(seconds=PATIENCE_S)) as here:
            total = here.sum_(torch.ones(1)).item()
            tell("gloo", together=total, interfaces=interfaces_in_use())
            if here.device.type == "cuda" and here.local_size <= torch.cuda.device_count():
                what = "nccl"
                tell("nccl", together=here.sum_(torch.ones(1, device=here.device)).item())
    except Exception as error:
        why = f" ({sentence(error.__cause__)})" if error.__cause__ else ""
        there = [f"{name} {ip}" for ip, name in interfaces().items()]
        tell(what, error=sentence(error) + why, interfaces=there[:8])


def interfaces() -> dict[str, str]:
    """Names of the network interfaces by their IPv4 addresses."""
    import psutil

    every = ((name, address) for name, addresses in psutil.net_if_addrs().items() for address in addresses)
    return {address.address: name for name, address in every if address.family == socket.AF_INET}


def interfaces_in_use() -> list[str]:
    """Those of this process's connections, but for that to the first rank's list of the others."""
    import psutil

    process = psutil.Process()
    connections = getattr(process, "net_connections", None) or process.connections
    store = int(os.environ["MASTER_PORT"])
    open_ones = [one for one in connections(kind="tcp") if one.status == psutil.CONN_ESTABLISHED and one.raddr]
    used = {one.laddr.ip.removeprefix("::ffff:") for one in open_ones if store not in (one.laddr.port, one.raddr.port)}
    known = interfaces()
    return sorted({"lo" if ip.startswith("127.") else known.get(ip, ip) for ip in used})


@dataclass(frozen=True)
class Probe:
    """What submitit calls on the first node: the ranks' words go into the file `words`, then there is `ended`."""

    stage: Any
    python: tuple[str, ...]
    srun: tuple[str, ...]

    def __call__(self) -> None:
        """Starts the ranks as those of a stage, but what they print comes through srun and not through the disk."""
        from launch.starters import TORCHRUN, InSlurm, free_port, own_address

        folder = self.stage.run.absolute()
        command = InSlurm(self.python, self.srun).command(self.stage, folder, own_address(), free_port())
        *start, address, port, local_size, _ = command
        at = start.index("launch.rank")
        left_out = ("--output=", "--open-mode=", "--unbuffered", "--kill-on-bad-exit=")
        words = [word for word in start[:at] if not word.startswith(left_out)]
        ask = [*words, "launch.probe", str(folder), address, port, local_size]
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        if self.python:
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        with (folder / "words").open("wb") as file:
            subprocess.run(ask, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        (folder / "ended").touch()


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
        began = time.monotonic()
        for facts in [report["folder"] for report in self.reports.values() if "folder" in report]:
            while "token" in facts and "visible_after" not in facts and time.monotonic() - began < VISIBLE_S:
                if (folder / f"rank{facts['rank']}").read_text() == token:
                    facts["visible_after"] = time.monotonic() - began
                else:
                    time.sleep(0.5)

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


def counted(number: int, what: str = "node") -> str:
    """`2 nodes`."""
    return f"{number} {what}{'s' * (number != 1)}"


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
    nothing = {"error": "no word of it", "gpus": 0}
    return torch_finding(report.get("torch", nothing), report.get("driver", nothing), wanted)


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
        return Finding(OK, f"{name}: {num_ranks} ranks on {counted(nodes)} added up{through}")
    wrong = [facts for facts in answers if facts not in good]
    silent = num_ranks - len(answers)
    told = f"rank {wrong[0]['rank']} on {wrong[0]['node']}: {wrong[0].get('error', 'a wrong sum')}" if wrong else ""
    text = "; ".join(filter(None, [told, f"{silent} of {num_ranks} ranks gave no answer" * bool(silent)]))
    there = f"; it has {', '.join(wrong[0].get('interfaces', []))}" if wrong else ""
    export = f"export {what.upper()}_SOCKET_IFNAME=<interface that the nodes share>"
    return Finding(FAIL, f"{name}: {text}", f"try `{export}`, in the profile's setup{there}; or a firewall is between")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
