"""What a job does: the command line of one stage, and how its processes are started where the job runs."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cxr_vae.config import Config
from cxr_vae.errors import UserError
from cxr_vae.index import MANIFEST


class StageFailedError(RuntimeError):
    """A stage ended with another exit code than 0; on Slurm this fails the job, so that what waits for it knows."""


@dataclass(frozen=True)
class Stage:
    """One stage as a picklable job: `cxr-vae` with `arguments`, in as many processes as asked for."""

    name: str
    arguments: tuple[str, ...]
    processes: int | None = 1
    """A machine; None: one a GPU, or one."""
    cuda_visible_devices: str | None = None
    """Of the submitter: submitit's local executor hides the GPUs it wasn't told of."""
    launcher: int = 0
    """Process that shows this job to a person on this machine; the job ends with it. 0: none."""

    def __call__(self) -> int:
        """Runs inside the job: one rank of it on Slurm; on this machine, all of them under torchrun."""
        if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
            return self.run_all_ranks()
        code = self.run_as_rank()
        if code:
            raise StageFailedError(f"{self.name} ended with exit code {code}")
        return code

    def run_as_rank(self) -> int:
        """Slurm started one task a rank: says so in torchrun's variables, then runs the stage in this process."""
        from submitit.helpers import TorchDistributedEnvironment

        from cxr_vae.cli import main

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        return main(self.arguments)

    def run_all_ranks(self) -> int:
        """Runs the command and returns its exit code; passes TERM on to it, also when the launcher is gone."""
        environment = dict(os.environ)
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if self.cuda_visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.cuda_visible_devices
        processes = self.processes or _count_gpus(environment) or 1
        # torchrun would set 1 thread a process, with a warning; the stages set their own number again.
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
        # Ctrl-C reaches the command from the terminal; a handler that does nothing isn't inherited by it.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        with subprocess.Popen(self.command(processes), env=environment) as child:
            signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
            while child.poll() is None:
                if self.launcher and not _is_alive(self.launcher):
                    child.terminate()
                    child.wait()
                time.sleep(0.2)
        return child.returncode

    def command(self, processes: int) -> list[str]:
        """What is typed by hand to the same effect."""
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        return [sys.executable, *many, "-m", "cxr_vae", *self.arguments]


def _count_gpus(environment: dict[str, str]) -> int:
    """GPUs a process with this environment sees; asked in another process, since torch looks only once."""
    code = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(answer.stdout)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def shard_stage(config: Config) -> Stage | None:
    """Sharding as the configuration says; None where there is no source but the shards are there."""
    data = config.data
    if data.source is None:
        if (Path(data.shards) / MANIFEST).is_file():
            return None
        raise UserError(f"data.shards={data.shards} holds no shards and data.source is not set: name a folder")
    arguments = ["shard", data.source, data.shards, f"--image-size={data.image_size}", f"--fit={data.fit}"]
    arguments += [f"--format={data.format}", f"--max-rejected={data.max_rejected}"]
    return Stage("shard", (*arguments, *([f"--workers={data.workers}"] if data.workers else [])))


def train_stage(config: Config, config_path: Path) -> Stage:
    """Training with the resolved configuration at `config_path`."""
    return _stage(config, "train", str(config_path))


def evaluate_stage(config: Config) -> Stage:
    """Evaluation of the run with the configuration's options for it."""
    options = [f"evaluate.{name}={value}" for name, value in config.evaluate.model_dump().items()]
    options += [f"device={config.device}", f"data.shards={config.data.shards}"]
    return _stage(config, "evaluate", config.run_dir, *options)


def _stage(config: Config, *arguments: str) -> Stage:
    resources = config.resources
    return Stage(
        arguments[0],
        arguments,
        resources.processes_per_node or resources.gpus_per_node or None,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
