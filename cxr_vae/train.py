"""Training: `cxr-vae train`. The loop, one step of it, and what is done at the end of an epoch and of a run."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cxr_vae.checkpoint import Checkpoints
from cxr_vae.config import Config
from cxr_vae.console import Progress
from cxr_vae.dataset import XrayDataset, open_dataset, read_ahead
from cxr_vae.distributed import World, even_parts, gradients_stay_local, world
from cxr_vae.errors import UserError
from cxr_vae.export import hyperparameters, save_vae, set_aside
from cxr_vae.files import write_json
from cxr_vae.losses import Losses, negative_elbo
from cxr_vae.noise import normal
from cxr_vae.pictures import save_loss_curves
from cxr_vae.precision import advise, autocast, check_precision
from cxr_vae.run_dir import RunDir
from cxr_vae.run_log import RunLog, in_words, loss_record, read_epochs
from cxr_vae.schedules import kl_weight, learning_rate
from cxr_vae.state import TrainState
from cxr_vae.stopping import StopSignal
from cxr_vae.stream import TrainingStream
from cxr_vae.validation import save_grids, test_losses, to_float


def train(config: Config) -> bool:
    """Trains up to the last step, going on from the newest checkpoint where there is one.

    Returns whether it got there: False where a signal asked to stop, after saving a checkpoint. Raises UserError for
    a run directory, shards or options that don't fit together, before anything is written.
    """
    run = RunDir(Path(config.run_dir))
    run.check(config)
    with StopSignal() as stop, world(config.device) as here:
        return _train(config, run, here, stop)


def _train(config: Config, run: RunDir, here: World, stop: StopSignal) -> bool:
    """Between joining the other processes and leaving them.

    A function of its own, so that DistributedDataParallel is gone before the process group is: its destructor, if it
    held the last reference to a gloo group, would wait with Python's lock for a thread that waits for this lock.
    """
    training = Training.begin(config, run, here)
    finished = training.loop(stop)
    if finished and here.is_main:
        training.finish()
    training.log.close()
    return finished


@dataclass
class Training:
    """One attempt at a run: from wherever it was to the end or to a signal."""

    config: Config
    run: RunDir
    here: World
    train_set: XrayDataset
    test_set: XrayDataset
    state: TrainState
    model: nn.Module
    checkpoints: Checkpoints
    log: RunLog

    @classmethod
    def begin(cls, config: Config, run: RunDir, here: World) -> "Training":
        """Opens the data, builds the model and loads the newest checkpoint."""
        check_batch(config, here)
        check_precision(config.train.precision, here.device)
        train_set = open_dataset(config.data, config.data.train_split, here.local_size)
        test_set = open_dataset(config.data, config.data.test_split, here.local_size)
        state = TrainState.create(config, here.device)
        hashes = {data.index.split: data.index.content_hash for data in (train_set, test_set)}
        identity = {"index_hashes": hashes, "config": config.model_dump()}
        checkpoints = Checkpoints(run.checkpoints, here, config.checkpoint.keep, identity)
        loaded, skipped = checkpoints.load_latest(state)
        check_length(config, state, len(train_set))
        if here.is_main:
            run.claim(config, {"world_size": here.size, "device": str(here.device)})
            if state.step < count_steps(config, len(train_set)):
                set_aside(run.weights)  # of a run that is now made longer
        log = RunLog(run, state.step, enabled=here.is_main)
        training = cls(config, run, here, train_set, test_set, state, here.parallel(state.model), checkpoints, log)
        if here.is_main:
            advice = advise(config.train.precision, here.device)
            print(*skipped, training.greeting(loaded), *([advice] if advice else []), sep="\n", flush=True)
        return training

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return count_steps(self.config, len(self.train_set))

    def loop(self, stop: StopSignal) -> bool:
        """Steps until the last one or a signal, on all ranks together; returns whether the last one was reached."""
        state, batch_size = self.state, self.config.train.batch_size
        total = self.num_steps * batch_size
        with (
            Progress(total, "train", done=state.samples_seen, enabled=self.here.is_main) as progress,
            read_ahead(self.train_set, self.slices()) as batches,
        ):
            for images in batches:
                epochs_before = state.samples_seen // len(self.train_set)
                sums = self.step(images)
                state.advance(sums, batch_size)
                progress.advance(batch_size, self.log.note)

                finished = state.step == self.num_steps
                if finished or state.step % self.config.train.log_every == 0:
                    self.log_step(sums)
                if state.samples_seen // len(self.train_set) > epochs_before:
                    self.end_epoch(progress)
                stopping = self.here.any(stop.requested)
                if stopping or finished or state.step % self.config.checkpoint.every == 0:
                    self.losses_of(sums)  # no checkpoint of a loss that is no number
                    self.log.sync()
                    self.checkpoints.save(state)
                if stopping and not finished:
                    progress.say(f"stopped by a signal after step {state.step}; the same command goes on from there")
                    return False
        return True

    def slices(self) -> Iterator[npt.NDArray[np.int64]]:
        """This rank's rows of each batch still to come."""
        stream = TrainingStream(len(self.train_set), self.config.seed)
        batch_size = self.config.train.batch_size
        for step in range(self.state.step, self.num_steps):
            yield stream.rows(*self.here.slice(step * batch_size, (step + 1) * batch_size))

    def step(self, images: Tensor) -> Tensor:
        """One update from this rank's uint8 images; returns (2,) reconstruction and KL summed over the whole batch."""
        config, state, here = self.config, self.state, self.here
        start, stop = here.slice(state.samples_seen, state.samples_seen + config.train.batch_size)
        noise = normal(config.seed, "train", start, stop, state.model.latent_shape, here.device)
        weight = kl_weight(state.step, config.objective)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, self.num_steps, config.optimizer)

        state.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=here.device)
        parts = list(even_parts((to_float(images, here.device), noise), config.train.accumulate))
        for number, (part, part_noise) in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else gradients_stay_local(self.model):
                with autocast(config.train.precision, here.device):
                    output = self.model(part, part_noise)
                losses = negative_elbo(output.logits, part, output.mean, output.logvar)
                # The mean over the global batch: parts may be unequal, and gradients are averaged over the ranks.
                loss = losses.total(weight).sum() * (here.size / config.train.batch_size)
                state.scaler.scale(loss).backward()
            sums += torch.stack([term.detach().double().sum() for term in losses])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        here.average_buffers(state.model)
        return here.sum_(sums)

    def losses_of(self, sums: Tensor) -> Losses:
        """Mean losses of the step just done; UserError, on every rank, where they are no numbers any more."""
        losses = Losses(*(sums / self.config.train.batch_size).cpu())
        if not losses.total().isfinite():
            raise UserError(
                f"the loss is {float(losses.total())} at step {self.state.step}: lower optimizer.lr or use "
                "train.precision=fp32; the checkpoints before it are whole"
            )
        return losses

    def log_step(self, sums: Tensor) -> None:
        """Records the losses of the step just done."""
        state, config = self.state, self.config
        weight = kl_weight(state.step - 1, config.objective)
        record = loss_record(self.losses_of(sums), weight, config.data.image_size)
        rate = learning_rate(state.step - 1, self.num_steps, config.optimizer)
        record = {"samples_seen": state.samples_seen, **record, "lr": rate, "kl_weight": weight}
        self.log.step(state.step, config.train.batch_size, record)

    def end_epoch(self, progress: Progress) -> None:
        """Test loss, records and pictures."""
        config, state = self.config, self.state
        epoch = state.samples_seen // len(self.train_set)
        weight = kl_weight(state.step - 1, config.objective)
        train_record, test_record = (
            loss_record(losses, weight, config.data.image_size)
            for losses in (
                Losses(*state.end_epoch()),
                test_losses(state.best_model, self.test_set, config, self.here),
            )
        )
        self.log.metrics("epoch", state.step, {"epoch": epoch, "train": train_record, "test": test_record})
        if self.here.is_main:
            if epoch % config.train.grid_every == 0 or state.step == self.num_steps:
                save_grids(self.run, epoch, state.best_model, self.test_set, config, self.here.device)
            progress.say(
                f"epoch {epoch}/{config.train.epochs}: train {in_words(train_record)}; test {in_words(test_record)}"
            )

    def finish(self) -> None:
        """Exports the weights, with the curves and hyperparameters that belong to them."""
        config, state, run = self.config, self.state, self.run
        epochs = read_epochs(run)
        if epochs:
            save_loss_curves(run.curves, epochs)
        sizes = {"num_train_images": len(self.train_set), "num_test_images": len(self.test_set)}
        write_json(run.path / "hyperparameters.json", hyperparameters(config, state.best_model) | sizes)
        save_vae(run.weights, state.best_model, config, step=state.step, samples_seen=state.samples_seen)
        print(f"trained weights: {run.weights}", flush=True)

    def greeting(self, loaded: str | None) -> str:
        """What is about to happen, in a line."""
        here, train_config = self.here, self.config.train
        where = f"going on from {loaded}" if loaded else "starting"
        return (
            f"{self.run.path}: {where}, {self.num_steps} steps of {train_config.batch_size} images "
            f"({train_config.epochs} epochs of {len(self.train_set)}), {here.size} "
            f"{'process' if here.size == 1 else 'processes'} on {here.device.type}, {train_config.precision}, "
            f"images {'in memory' if self.train_set.in_memory else 'read from the shards'}"
        )


def count_steps(config: Config, num_images: int) -> int:
    """Steps of a run, each of a whole batch: the last one may reach a few images into a further epoch."""
    return math.ceil(config.train.epochs * num_images / config.train.batch_size)


def check_length(config: Config, state: TrainState, num_images: int) -> None:
    """Raises UserError where the run is past the end that is asked for: its weights would be mislabelled."""
    if state.step > count_steps(config, num_images):
        raise UserError(
            f"{config.run_dir} has done {state.step} steps, more than the {count_steps(config, num_images)} of "
            f"train.epochs={config.train.epochs}: ask for more epochs or name another run_dir"
        )


def check_batch(config: Config, here: World) -> None:
    """Raises UserError where a batch can't be divided among the ranks and their micro-batches."""
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if batch_size < here.size * accumulate:
        raise UserError(
            f"train.batch_size={batch_size} is less than one image for each of {here.size} processes x "
            f"{accumulate} micro-batches; raise it or start fewer processes"
        )
    pixels = (config.data.image_size >> len(config.model.channels)) ** 2
    if batch_size // (here.size * accumulate) * pixels < 2:
        raise UserError(
            f"train.batch_size={batch_size} leaves micro-batches of one image, whose smallest feature map is one "
            "pixel, and batch norm needs two values; raise it or start fewer processes"
        )
