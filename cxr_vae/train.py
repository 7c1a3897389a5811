"""Training: `cxr-vae train`. The loop, one step of it, and what is done at the end of an epoch and of a run."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cxr_vae.checkpoint import Checkpoints
from cxr_vae.config import Config, check_batch
from cxr_vae.console import Progress
from cxr_vae.dataset import XrayDataset, open_dataset, open_split, read_ahead
from cxr_vae.distributed import World, even_parts, gradients_stay_local, world
from cxr_vae.errors import UserError
from cxr_vae.export import hyperparameters, save_vae, set_aside
from cxr_vae.files import write_json
from cxr_vae.guard import SMALLEST_SCALE, describe_nonfinite, gradient_norm
from cxr_vae.heartbeat import Heartbeat
from cxr_vae.locks import DirectoryLock
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

    Returns whether it got there: False where it was asked to stop, after saving a checkpoint. Raises UserError for a
    run directory, shards or options that don't fit together, before anything is written.
    """
    run = RunDir(Path(config.run_dir))
    run.check(config)
    patience = timedelta(minutes=config.train.stall_minutes)
    with StopSignal(config.train.max_minutes) as stop, world(config.device, patience) as here:
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
    training.close()
    return finished


@dataclass
class Training:
    """One attempt at a run: from wherever it was to the end or to a signal."""

    config: Config
    run: RunDir
    here: World
    lock: DirectoryLock | None
    train_set: XrayDataset
    test_set: XrayDataset
    state: TrainState
    model: nn.Module
    checkpoints: Checkpoints
    log: RunLog
    heart: Heartbeat

    @classmethod
    def begin(cls, config: Config, run: RunDir, here: World) -> "Training":
        """Opens the data, takes the run directory, builds the model and loads the newest checkpoint."""
        check_batch(config, here.size)
        check_precision(config.train.precision, here.device)
        train_index, test_index = (open_split(config.data, name) for name in split_names(config))
        lock = run.take(config) if here.is_main else None
        train_set, test_set = (open_dataset(config.data, index, here.local_size) for index in (train_index, test_index))
        state = TrainState.create(config, here.device)
        log = RunLog(run, enabled=here.is_main)
        hashes = {index.split: index.content_hash for index in (train_index, test_index)}
        # No checkpoint outlives its metrics.
        checkpoints = Checkpoints(run.checkpoints, here, config, hashes, before_publishing=log.sync)
        loaded, skipped = checkpoints.load_latest(state)
        check_length(config, state, len(train_set))
        if here.is_main:
            run.claim(config, {"world_size": here.size, "device": str(here.device)})
            if state.step < count_steps(config, len(train_set)):
                set_aside(run.weights)  # of a run that is now made longer
        log.begin(state.step)
        model = here.parallel(state.model)
        num_steps, batch_size = count_steps(config, len(train_set)), config.train.batch_size
        heart = Heartbeat(run.heartbeat, num_steps, batch_size, enabled=here.is_main)
        training = cls(config, run, here, lock, train_set, test_set, state, model, checkpoints, log, heart)
        training.beat("starting")
        if here.is_main:
            advice = advise(config.train.precision, here.device)
            print(*skipped, training.greeting(loaded), *([advice] if advice else []), sep="\n", flush=True)
        return training

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return count_steps(self.config, len(self.train_set))

    def loop(self, stop: StopSignal) -> bool:
        """Steps until the last one or a reason to stop, on all ranks together; returns whether the last was reached."""
        state, batch_size = self.state, self.config.train.batch_size
        stop.defer()
        with (
            Progress(self.num_steps * batch_size, "train", done=state.samples_seen, enabled=self.here.is_main) as bar,
            read_ahead(self.train_set, self.slices()) as batches,
        ):
            for images in batches:
                epoch = state.samples_seen // len(self.train_set)
                self.step(images)
                bar.advance(batch_size, self.log.note)
                if self.heart.is_due():
                    self.beat("training")

                test_loss = None
                if state.samples_seen // len(self.train_set) > epoch:
                    test_loss = self.end_epoch(bar)
                best = self.config.checkpoint.best and test_loss is not None and state.is_best(test_loss)
                finished = state.step == self.num_steps
                stopping, due = self.here.any(stop.reason is not None, self.checkpoints.is_due(state.step))
                if stopping or finished or due or best:
                    self.checkpoints.save(state, test_loss, last=stopping or finished)
                if stopping and not finished:
                    reason = stop.reason or "another process was told to"
                    self.beat("stopped", reason)
                    bar.say(f"stopped after step {state.step} ({reason}); the same command goes on from there")
                    return False
        return True

    def slices(self) -> Iterator[npt.NDArray[np.int64]]:
        """This rank's rows of each batch still to come."""
        stream = TrainingStream(len(self.train_set), self.config.seed)
        batch_size = self.config.train.batch_size
        for step in range(self.state.step, self.num_steps):
            yield stream.rows(*self.here.slice(step * batch_size, (step + 1) * batch_size))

    def step(self, images: Tensor) -> None:
        """One update from this rank's uint8 images; logs it when it is due."""
        config, state, here = self.config, self.state, self.here
        start, stop = here.slice(state.samples_seen, state.samples_seen + config.train.batch_size)
        noise = normal(config.seed, "train", start, stop, state.model.latent_shape, here.device)
        weight = kl_weight(state.step, config.objective)
        rate = learning_rate(state.step, self.num_steps, config.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        buffers = [buffer.clone() for buffer in state.model.buffers()] if config.train.skip_nonfinite else []

        sums, finite = self.backward(images, noise, weight)
        scale = state.scaler.get_scale()
        norm = gradient_norm(state.model.parameters()) / scale
        # Sums and gradients are the same on all ranks, so all decide the same. fp16's scaler looks at gradients itself,
        # and lowers the scale; where that doesn't help any more, it is as without one.
        if sums.isfinite().all() and (norm.isfinite() or (state.scaler.is_enabled() and scale > SMALLEST_SCALE)):
            state.scaler.step(state.optimizer)
            state.scaler.update()
            here.average_buffers(state.model)
            state.advance(sums, config.train.batch_size)
            if state.step == self.num_steps or state.step % config.train.log_every == 0:
                self.log_step(sums, float(norm), rate, weight)
        else:
            self.skip_or_stop(start + (~finite).nonzero().flatten().cpu().numpy())
            for buffer, kept in zip(state.model.buffers(), buffers, strict=True):
                buffer.copy_(kept)
        state.optimizer.zero_grad(set_to_none=True)

    def backward(self, images: Tensor, noise: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over the whole batch, on every rank.

        Returns (2,) reconstruction and KL summed over the whole batch, and for each of this rank's images whether its
        loss is a finite number.
        """
        config, here = self.config, self.here
        self.state.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=here.device)
        finite = []
        parts = list(even_parts((to_float(images, here.device), noise), config.train.accumulate))
        for number, (part, part_noise) in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else gradients_stay_local(self.model):
                with autocast(config.train.precision, here.device):
                    output = self.model(part, part_noise)
                losses = negative_elbo(output.logits, part, output.mean, output.logvar)
                # The mean over the global batch: parts may be unequal, and gradients are averaged over the ranks.
                loss = losses.total(weight).sum() * (here.size / config.train.batch_size)
                self.state.scaler.scale(loss).backward()
            sums += torch.stack([term.detach().double().sum() for term in losses])
            finite.append(losses.total().isfinite())
        return here.sum_(sums), torch.cat(finite)

    def skip_or_stop(self, positions: npt.NDArray[np.int64]) -> None:
        """Counts and records a step that must not change anything; UserError, on all ranks, where there were too many.

        `positions` in the stream of this rank's images with a loss that is no finite number.
        """
        state, options = self.state, self.config.train
        stream = TrainingStream(len(self.train_set), self.config.seed)
        rows = [int(stream.rows(place, place + 1)[0]) for place in positions.tolist()]
        mine = self.train_set.index.texts("source", rows) if rows else []
        images = self.here.broadcast(self.here.gather(mine))
        state.skip(options.batch_size)
        what = describe_nonfinite(state.step, images)
        self.log.write("skipped", state.step, {"images_by_rank": images})
        if state.num_skipped <= options.skip_nonfinite:
            if self.here.is_main:
                print(f"warning: {what}; skipped, {state.num_skipped} of {options.skip_nonfinite}", flush=True)
            return
        sentence = (
            f"{what}: lower optimizer.lr, use train.precision=fp32, or let train.skip_nonfinite={state.num_skipped} "
            f"steps be skipped; the checkpoints before it are whole, {self.run.metrics} lists the images"
        )
        try:
            self.checkpoints.wait()
        except UserError as failure:
            sentence = f"{sentence}; and {failure}"
        raise UserError(sentence)

    def log_step(self, sums: Tensor, norm: float, rate: float, weight: float) -> None:
        """Records the losses of the step just done."""
        losses = Losses(*(sums / self.config.train.batch_size).cpu())
        record = loss_record(losses, weight, self.config.data.image_size)
        record = {"samples_seen": self.state.samples_seen, **record, "lr": rate, "kl_weight": weight}
        self.log.step(self.state.step, self.config.train.batch_size, record | {"gradient_norm": norm})

    def end_epoch(self, progress: Progress) -> float:
        """Records and pictures; returns the test loss in nats an image, the negative ELBO."""
        config, state = self.config, self.state
        epoch = state.samples_seen // len(self.train_set)
        weight = kl_weight(state.step - 1, config.objective)
        test = test_losses(state.best_model, self.test_set, config, self.here)
        train_record, test_record = (
            loss_record(losses, weight, config.data.image_size) for losses in (Losses(*state.end_epoch()), test)
        )
        self.log.epoch(state.step, epoch, train_record, test_record)
        if self.here.is_main:
            if epoch % config.train.grid_every == 0 or state.step == self.num_steps:
                self.save_pictures(epoch)
            progress.say(
                f"epoch {epoch}/{config.train.epochs}: train {in_words(train_record)}; test {in_words(test_record)}"
            )
        return float(test.total())

    def save_pictures(self, epoch: int) -> None:
        """Samples and reconstructions; without them where the disk is full and training is to go on regardless."""
        try:
            save_grids(self.run, epoch, self.state.best_model, self.test_set, self.config, self.here.device)
        except OSError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise
            print(f"warning: no pictures of epoch {epoch} ({error.strerror}), training goes on", flush=True)

    def beat(self, state: str, reason: str | None = None) -> None:
        """Says where the run is, to whoever looks from outside."""
        losses = {"loss_nats": self.log.loss_nats, "test_loss_nats": self.log.test_loss_nats}
        self.heart.beat(state, self.state.step, losses | {"reason": reason})

    def finish(self) -> None:
        """Exports the weights, with the curves and hyperparameters that belong to them."""
        config, state, run = self.config, self.state, self.run
        epochs = read_epochs(run)
        if epochs:
            save_loss_curves(run.curves, epochs)
        sizes = {"num_train_images": len(self.train_set), "num_test_images": len(self.test_set)}
        write_json(run.path / "hyperparameters.json", hyperparameters(config, state.best_model) | sizes)
        save_vae(run.weights, state.best_model, config, step=state.step, samples_seen=state.samples_seen)
        self.beat("finished")
        print(f"trained weights: {run.weights}", flush=True)

    def close(self) -> None:
        """Closes the files and lets the next one into the run directory."""
        self.log.close()
        if self.lock is not None:
            self.lock.release()

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


def split_names(config: Config) -> tuple[str, str]:
    """Of the images to train on and to test on."""
    return config.data.train_split, config.data.test_split


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
