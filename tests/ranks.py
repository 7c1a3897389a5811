"""Checks that run on several real processes, started by `on_ranks`.

Each function runs on every rank; what it returns is saved for the test that asked.
"""

import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cxr_vae.checkpoints import parts
from cxr_vae.config_file import load_config
from cxr_vae.console import Progress
from cxr_vae.data import reader
from cxr_vae.data.dataset import open_dataset, open_split
from cxr_vae.distributed import World, world
from cxr_vae.errors import LostPeersError, UserError
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import StopSignal
from cxr_vae.training.train import Training, train
from launch.starters import free_port
from tests.helpers import HANG_S, TINY, wait_until


def begin(here: World, shards: str, run_dir: str, *options: str) -> Training:
    """A training run at its start."""
    config = load_config(None, [*TINY, f"data.shards={shards}", f"run_dir={run_dir}", *options])
    return Training(config, RunDir(Path(config.run_dir)), here)


def gradients(here: World, shards: str, run_dir: str, *options: str) -> dict[str, Tensor]:
    """Gradients and losses of the first step, in float32 and with group norm, which sees one image at a time."""
    training = begin(here, shards, run_dir, "precision=fp32", "norm=group", *options)
    images = training.train_set.images(next(training.slices()))
    start, stop = here.slice(0, training.config.train.batch_size)
    sums, finite = training.update.backward(training.batch(images, start, stop), 1.0)
    assert finite.all()
    gradients = {name: parameter.grad for name, parameter in training.state.model.named_parameters()}
    if training.state.critic is not None:
        critic = training.state.critic.model.named_parameters()
        gradients |= {f"critic.{name}": parameter.grad for name, parameter in critic}
    return {"sums": sums, **{name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}}


def visited(here: World, shards: str, run_dir: str, *options: str) -> dict[str, Any]:
    """The ids of the images of each step of a whole run on this rank, and the noise it draws for them."""
    training = begin(here, shards, run_dir, *options)
    names = training.train_set.index.texts("source")
    images = training.train_set.images(range(len(names)))
    ids = {image.numpy().tobytes(): name for image, name in zip(images, names, strict=True)}
    steps: list[list[str]] = []
    noise: list[Tensor] = []
    step, forward = training.step, training.state.model.forward

    def stepping(images: Tensor) -> Any:
        steps.append([ids[image.numpy().tobytes()] for image in images])
        return step(images)

    def forwarding(images: Tensor, epsilon: Tensor, labels: Tensor | None) -> Any:
        noise.append(epsilon)
        return forward(images, epsilon, labels)

    training.step = stepping  # type: ignore[method-assign]
    training.state.model.forward = forwarding  # type: ignore[method-assign]
    training.state.model.eval()
    assert training.loop(StopSignal())
    return {"ids": steps, "noise": noise[: len(steps)]}


def leg(here: World, shards: str, run_dir: str, until: str, *options: str) -> dict[str, Any]:
    """Goes on with a run up to step `until` and saves: the ids and noise of this rank step by step, and its state."""
    training = begin(here, shards, run_dir, *options)
    first = training.state.step
    sources, noise = training.train_set.index.texts("source"), []
    backward = training.update.backward

    def noting(batch: Sequence[Tensor], weight: float) -> Any:
        noise.append(batch[1].clone())
        return backward(batch, weight)

    training.update.backward = noting  # type: ignore[method-assign]
    ids = []
    for rows in itertools.islice(training.slices(), int(until) - first):
        ids.append([sources[row] for row in rows])
        outcome = training.step(training.train_set.images(rows))
        training.log_step(outcome, Progress(0, "train", enabled=False))
    training.checkpoints.save(training.state, last=True)
    training.close()
    state = {name: tensor.clone() for name, tensor in training.state.state_dict().items()}
    return {"first": first, "ids": ids, "noise": noise, "state": state}


def states(here: World, shards: str, run_dir: str, *options: str) -> dict[str, Tensor]:
    """The whole state of this rank after a run: all ranks should hold the same."""
    training = begin(here, shards, run_dir, *options)
    assert training.loop(StopSignal())
    return {name: tensor.clone() for name, tensor in training.state.state_dict().items()}


def poisoned(here: World, shards: str, run_dir: str, *options: str) -> dict[str, Any]:
    """A run in which the last rank's losses of the third step come to nan."""
    training = begin(here, shards, run_dir, *options)
    backward, before = training.update.backward, {}

    def poisoning(batch: Sequence[Tensor], weight: float) -> Any:
        images, noise, labels = batch
        if training.state.step == 2:
            before.update({name: tensor.clone() for name, tensor in training.state.state_dict().items()})
            noise = noise * (float("nan") if here.rank == here.size - 1 else 1)
        return backward((images, noise, labels), weight)

    training.update.backward = poisoning  # type: ignore[method-assign]
    step, unchanged = training.step, True

    def stepping(images: Tensor) -> Any:
        nonlocal unchanged
        poisoned = training.state.step == 2
        outcome = step(images)
        if poisoned:
            after = training.state.state_dict()
            unchanged = all(torch.equal(after[name], value) for name, value in before.items() if name != "counters")
        return outcome

    training.step = stepping  # type: ignore[method-assign]
    error = ""
    try:
        training.loop(StopSignal())
    except UserError as caught:
        error = str(caught)
    training.close()
    state = training.state
    return {"error": error, "skipped": state.num_skipped, "step": state.step, "unchanged_by_skip": unchanged}


def unreadable_part(here: World, shards: str, run_dir: str) -> dict[str, str]:
    """What a save says on this rank if the last rank can't read its own part again."""
    training = begin(here, shards, run_dir)

    def failing(paths: Any) -> Any:
        raise OSError(5, "Input/output error")

    if here.rank == here.size - 1:
        parts.describe_files = failing
    training.step(training.train_set.images(next(training.slices())))
    try:
        training.checkpoints.save(training.state, last=True)
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


def loaded(here: World, shards: str, loading: str) -> dict[str, Any]:
    """All training images as this rank has them after each rank has used its half; and how many it decoded."""
    decoded, decode = 0, reader.decode

    def counting(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*arguments)

    reader.decode = counting
    config = load_config(None, [*TINY, f"data.shards={shards}", f"data.loading={loading}"]).data
    dataset = open_dataset(config, open_split(config, "train"), here)
    dataset.images(range(*here.slice(0, len(dataset))))
    here.barrier()
    return {"images": dataset.images(range(len(dataset))), "decoded": decoded}


def collectives(here: World) -> dict[str, Any]:
    """What World promises, as this rank sees it."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean = torch.full((2,), float(here.rank))
    here.average_buffers(norm)
    return {
        "sum": here.sum_(torch.tensor([here.rank + 1.0])),
        "any": here.any(here.rank == here.size - 1, False, here.rank == 0),
        "mean": norm.running_mean,
        "batches": norm.num_batches_tracked,
        "broadcast": here.broadcast(f"from {here.rank}"),
        "all_gather": here.all_gather([here.rank] * here.rank),
        "slice": here.slice(100, 111),
    }


def alive_at_the_end(shards: str, run_dir: str, *options: str) -> int:
    """How many DistributedDataParallel there are when a training lets go of the process group; joins by itself."""
    alive = []
    destroy = dist.destroy_process_group

    def destroying() -> None:
        alive.append(sum(type(thing) is DistributedDataParallel for thing in gc.get_objects()))
        destroy()

    dist.destroy_process_group = destroying
    assert train(load_config(None, [*TINY, f"data.shards={shards}", f"run_dir={run_dir}", *options]))
    (count,) = alive
    return count


def two_sums_without_the_other(folder: str) -> str:
    """What rank 0 says when it waits for the second of two sums that rank 1 stays away from; joins by itself."""
    try:
        with world("cpu", timedelta(seconds=15)) as here:
            if here.rank == 1:
                wait_until((Path(folder) / "rank0.pt").exists)
                return ""
            first = dist.all_reduce(torch.ones(1), async_op=True)
            time.sleep(2)  # its time is over first, which ends the second
            dist.all_reduce(torch.ones(1))
            return f"{first} came"
    except LostPeersError as error:
        return str(error)


def on_ranks(function: str, ranks: int, out: Path, *arguments: Any, joined: bool = True) -> list[Any]:
    """Calls a function of this module on `ranks` processes; returns their results in rank order.

    `joined` by gloo beforehand, and told so by its first argument.

    A fork server that has imported torch already starts them, which saves seconds a process against torchrun; the
    variables they are told are torchrun's.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks"])
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, port, out, joined, [str(x) for x in arguments]))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}: see the captured stderr"
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(function: str, rank: int, size: int, port: int, out: Path, joined: bool, arguments: list[str]) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    target = out / f"rank{rank}.pt"
    if joined:
        with world("cpu") as here:
            torch.save(globals()[function](here, *arguments), target)
    else:
        torch.save(globals()[function](*arguments), target)
