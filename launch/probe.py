"""A look at the nodes: a short job whose ranks tell what they see there.

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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import slurm_commands
from launch.rank import identity

PATIENCE_S = 150
"""How long a rank waits for the others, which may still read torch from a slow disk."""

LIMIT_S = 330
"""Of a whole rank."""


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
    starter: Any

    def __call__(self) -> None:
        """Starts the ranks as those of a stage, but what they print comes through srun and not through the disk."""
        from launch.starters import free_port, own_address

        folder, starter = self.stage.run.absolute(), self.starter
        where = [str(folder), own_address(), str(free_port()), str(self.stage.ranks_per_node)]
        ask = [*starter.placed(self.stage), *(starter.python or [sys.executable]), "-u", "-m", "launch.probe", *where]
        with (folder / "words").open("wb") as file:
            subprocess.run(ask, stdout=file, stderr=subprocess.STDOUT, env=starter.environment(), check=False)
        (folder / "ended").touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
