"""Commands in processes of their own that needn't import torch first: most of a short command's time is that."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.starters import free_port

MOULD = multiprocessing.get_context("forkserver")
"""A process that has imported what a command imports, and is copied for each."""
MOULD.set_forkserver_preload(
    [
        *("cxr_vae.training.train", "cxr_vae.evaluation.evaluate", "cxr_vae.data.shards"),
        *("torch._dynamo", "torch.distributed.checkpoint", "torch.utils.tensorboard"),
    ]
)


def run_warm(
    arguments: Sequence[str], environment: dict[str, str], timeout_s: float, ranks: int = 1
) -> "subprocess.CompletedProcess[str]":
    """As `python -m cxr_vae` with these arguments, in `environment`; of several ranks with torchrun's variables."""
    end, port = time.monotonic() + timeout_s, str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            who = {name: str(value) for name, value in names.items()} | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            told = environment | (who if ranks > 1 else {})
            processes.append(MOULD.Process(target=be_command, args=(arguments, told, str(Path.cwd()), folder)))
            processes[-1].start()
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        if any(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout_s)
        codes = [process.exitcode for process in processes]
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), out, err)


def be_command(arguments: Sequence[str], environment: dict[str, str], cwd: str, folder: str) -> None:
    """In the copy: what the interpreter does for `-m cxr_vae`, from first to last."""
    for place, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), place)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["cxr-vae", *arguments]
    try:
        runpy.run_module("cxr_vae", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
