"""One rank of a job: says who it is in torchrun's variables, runs `cxr-vae`, and leaves its exit code in a file.

A process around the rank's own, which needs nothing but the standard library: so a rank that is killed leaves word too,
and a signal that reaches only this process is passed on. Slurm or `launch.supervisor` starts one for each rank.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

VISIBLE_S = 60.0
"""How late a network file system may show what was written on another machine."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    """`ENDS ADDRESS PORT RANKS_PER_NODE CORES cxr-vae's arguments …`; returns the exit code of `cxr-vae`."""
    ends, address, port, local_size, cores, *command = arguments
    place = {"MASTER_ADDR": address, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": local_size, "CXR_VAE_CORES": cores}
    environment = os.environ | identity() | place
    parent = os.getppid()
    child: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        early.append(number)
        for process in child:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    leave(Path(ends), int(environment["RANK"]), None)
    child.append(subprocess.Popen([sys.executable, "-u", "-m", "cxr_vae", *command], env=environment))
    for missed in early:  # came before there was anyone to pass them on to
        child[0].send_signal(missed)
    code = wait(child[0], parent)
    leave(Path(ends), int(environment["RANK"]), code)
    return code if code >= 0 else 128 - code


def wait(child: "subprocess.Popen[bytes]", parent: int) -> int:
    """The child's exit code, that of a signal negative; asks it to stop when whoever started us is gone."""
    told = False
    while True:
        try:
            return child.wait(0.5)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent and not told:
                child.terminate()
                told = True


def identity() -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK as Slurm says them, or as they are."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: os.environ[name if name in os.environ else slurm] for name, slurm in names.items()}


def leave(folder: Path, rank: int, code: int | None) -> None:
    """How this rank ended; without a code, that it began. A full disk is no reason to end."""
    path = folder / f"{rank}.json"
    temporary = folder / f".{rank}.tmp"
    try:
        temporary.write_text(
            json.dumps({"rank": rank, "host": socket.gethostname(), "code": code, "time": time.time()})
        )
        temporary.replace(path)
    except OSError as error:
        print(f"warning: {path}: {error.strerror}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
