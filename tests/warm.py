"""Commands in processes of their own that needn't import torch first: most of a short command's time is that."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MOULD = multiprocessing.get_context("forkserver")
"""A process that has imported what a command imports, and is copied for each."""
MOULD.set_forkserver_preload(
    [
        *("cxr_vae.training.train", "cxr_vae.evaluation.evaluate", "cxr_vae.data.shards"),
        *("torch._dynamo", "torch.distributed.checkpoint"),
    ]
)


def run_warm(
    arguments: Sequence[str], environment: dict[str, str], timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """As `python -m cxr_vae` with these arguments, in `environment`."""
    with tempfile.TemporaryDirectory() as folder:
        process = MOULD.Process(target=be_command, args=(arguments, environment, str(Path.cwd()), folder))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout_s)
        assert process.exitcode is not None
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def be_command(arguments: Sequence[str], environment: dict[str, str], cwd: str, folder: str) -> None:
    """In the copy: what the interpreter does for `-m cxr_vae`, from first to last."""
    for place, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), place)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["cxr-vae", *arguments]
    try:
        runpy.run_module("cxr_vae", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
