"""The loop of every training run: steps, records, checkpoints and the end, whatever it is that is trained.

What a run trains on and what it makes of a batch is told by a subclass: `train.Training` for VAEs,
`prior_training.PriorTraining` for priors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cxr_vae.checkpoints.saving import Checkpoints
from cxr_vae.checkpoints.state import TrainState
from cxr_vae.config import Config, check_batch
from cxr_vae.console import Progress
from cxr_vae.data.dataset import ImageSource, read_ahead
from cxr_vae.data.stream import TrainingStream
from cxr_vae.distributed import World
from cxr_vae.errors import UserError
from cxr_vae.files import write_json
from cxr_vae.heartbeat import Heartbeat
from cxr_vae.precision import advise, check_precision
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import StopSignal
from cxr_vae.training.compilation import check_compiler, compiled, profiler
from cxr_vae.training.efficiency import efficiency, in_a_line
from cxr_vae.training.guard import Outcome, UnseenOutcomes, describe_nonfinite
from cxr_vae.training.run_log import RunLog
from cxr_vae.training.schedules import kl_weight, learning_rate
from cxr_vae.training.step import Step
from cxr_vae.training.stopwatch import Stopwatch

PLACES = {"gpu": "on the GPU", "memory": "in memory", "shards": "read from the shards"}


class Loop(ABC):
    """One attempt at a run: from wherever it was to the end or to a signal."""

    remedies = "lower optimizer.lr, use train.precision=fp32, or raise train.skip_nonfinite to leave such steps out"
    """Where a loss is no finite number, in options of the command that began this."""

    def __init__(self, config: Config, run: RunDir, here: World) -> None:
        """Takes the run directory, opens the data, builds the network and loads the newest checkpoint."""
        check_batch(config, here.size)
        check_precision(config.train.precision, here.device)
        check_compiler(config.train.compile)
        self.config, self.run, self.here = config, run, here
        self.lock = run.take(config) if here.is_main else None
        self.train_set, self.test_set = self.open_sets()
        # The last may reach a few images into a further epoch.
        self.num_steps = math.ceil(config.train.epochs * len(self.train_set) / config.train.batch_size)
        self.stream = TrainingStream(len(self.train_set), config.seed, config.data.shuffle_block)
        self.state = TrainState.create(config, here.device, self.build_network())
        hashes = {data.index.split: data.index.content_hash for data in (self.train_set, self.test_set)}
        self.checkpoints = Checkpoints(
            run.checkpoints, here, config, hashes, before_publishing=self.settle, classes=self.train_set.index.classes
        )
        loaded, skipped = self.checkpoints.load_latest(self.state)
        if self.state.step > self.num_steps:  # its weights would be mislabelled
            raise UserError(
                f"{config.run_dir} has done {self.state.step} steps, more than the {self.num_steps} of "
                f"train.epochs={config.train.epochs}: ask for more epochs or name another run_dir"
            )
        if here.is_main:
            run.claim(config, {"world_size": here.size, "device": str(here.device)})
            if self.state.step < self.num_steps:
                self.set_aside()
        model = compiled(self.state.model, config.train.compile)
        self.update = self.make_step(here.parallel(model, compress=config.train.compress_gradients))
        self.heart = Heartbeat(run.heartbeat, self.num_steps, config.train.batch_size, enabled=here.is_main)
        self.unseen, self.stopwatch, self.first_step = UnseenOutcomes(self.state.scaler), Stopwatch(), self.state.step
        self._pictures = ThreadPoolExecutor(1, "pictures")
        self._writing: tuple[int, Future[None]] | None = None
        self.log = RunLog(run, self.state.step, self.stopwatch, enabled=here.is_main)
        self.beat("starting")
        if here.is_main:
            advice = advise(config.train.precision, here.device)
            print(*skipped, self.greeting(loaded), *([advice] if advice else []), sep="\n", flush=True)

    @abstractmethod
    def open_sets(self) -> tuple[ImageSource, ImageSource]:
        """What to train on and what to test on."""

    @abstractmethod
    def build_network(self) -> nn.Module:
        """What is trained, before the first step."""

    @abstractmethod
    def make_step(self, model: nn.Module) -> Step:
        """What makes a step of a batch; `model` is the network as it is to be called."""

    @abstractmethod
    def batch(self, images: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """All that a step needs of this rank's images, which stand at the positions start…stop of the stream."""

    @abstractmethod
    def record(self, means: Sequence[Tensor]) -> dict[str, float]:
        """Named figures from the means of a step's terms over images; `loss_nats` or `loss` is what is minimised."""

    @abstractmethod
    def test(self) -> tuple[float, dict[str, float]]:
        """The loss of the test split by which checkpoints are compared, and the figures to be recorded."""

    @abstractmethod
    def draw_pictures(self, epoch: int) -> Callable[[], None]:
        """Pictures of how far it is; what is returned writes them."""

    @abstractmethod
    def export(self) -> str:
        """Writes what was trained where the next stage looks for it; returns a line that says where."""

    @abstractmethod
    def flops_per_image(self) -> int:
        """Operations of a forward and a backward pass."""

    def set_aside(self) -> None:
        """Moves what an earlier, shorter run exported."""
        return

    def in_words(self, record: Mapping[str, float]) -> str:
        """A record for the screen."""
        return ", ".join(f"{name} {number:.4g}" for name, number in record.items())

    def loop(self, stop: StopSignal) -> bool:
        """Steps until the last one or a reason to stop, on all ranks together; returns whether the last was reached."""
        state, here, watch, batch_size = self.state, self.here, self.stopwatch, self.config.train.batch_size
        stop.defer()
        with (
            Progress(self.num_steps * batch_size, "train", done=state.samples_seen, enabled=here.is_main) as bar,
            profiler(self.run.profile if self.config.train.profile and here.is_main else None) as profile,
            read_ahead(self.train_set, self.slices(), pin=here.device.type == "cuda") as batches,
        ):
            for images in watch.waiting(batches):
                epoch = state.samples_seen // len(self.train_set)
                with watch("step"):
                    outcome = self.step(images)
                with watch("log"):
                    self.log_step(outcome, bar)
                    if profile is not None:
                        profile.step()

                test_loss = None
                if state.samples_seen // len(self.train_set) > epoch:
                    test_loss = self.end_epoch(bar)
                with watch("log"):
                    best = self.config.checkpoint.best and test_loss is not None and state.is_best(test_loss)
                    finished = state.step == self.num_steps
                    stopping, due = here.any(stop.reason is not None, self.checkpoints.is_due(state.step))
                if stopping or finished or due or best:
                    self.check()
                    with watch("checkpoint"):
                        self.checkpoints.save(state, test_loss, last=stopping or finished)
                if stopping and not finished:
                    reason = stop.reason or "another process was told to"
                    self.beat("stopped", reason)
                    bar.say(f"stopped after step {state.step} ({reason}); the same command goes on from there")
                    return False
        return True

    def slices(self) -> Iterator[npt.NDArray[np.int64]]:
        """This rank's rows of each batch still to come."""
        batch_size = self.config.train.batch_size
        for step in range(self.state.step, self.num_steps):
            yield self.stream.rows(*self.here.slice(step * batch_size, (step + 1) * batch_size))

    def step(self, images: Tensor) -> Outcome:
        """One update from this rank's images."""
        config, state = self.config, self.state
        start, stop = self.here.slice(state.samples_seen, state.samples_seen + config.train.batch_size)
        rate = learning_rate(state.step, self.num_steps, config.optimizer)
        outcome = self.update(self.batch(images, start, stop), kl_weight(state.step, config.objective), rate)
        self.unseen.add(state.step, outcome)
        return outcome

    def check(self) -> None:
        """Looks at the steps nobody has looked at yet; UserError, on all ranks, where one must not have been."""
        for step, finite in self.unseen.left_out():
            self.skip_or_stop(step, finite)

    def skip_or_stop(self, step: int, finite: Tensor) -> None:
        """Counts and records a step that changed nothing; UserError, on all ranks, where there were too many.

        `finite` (b,) bool: which of this rank's images have a loss that is a finite number.
        """
        state, options = self.state, self.config.train
        start, stop = self.here.slice((step - 1) * options.batch_size, step * options.batch_size)
        rows = self.stream.rows(start, stop)[~finite.numpy()].tolist()
        mine = self.train_set.index.texts("source", rows) if rows else []
        images = self.here.all_gather(mine)
        state.num_skipped += 1
        what = describe_nonfinite(step, images)
        self.log.write("skipped", step, {"images_by_rank": images})
        if state.num_skipped <= options.skip_nonfinite:
            if self.here.is_main:
                print(f"warning: {what}; skipped, {state.num_skipped} of {options.skip_nonfinite}", flush=True)
            return
        sentence = f"{what}: {self.remedies}; the checkpoints before it are whole, {self.run.metrics} lists the images"
        try:
            self.checkpoints.wait()
        except UserError as failure:
            sentence = f"{sentence}; and {failure}"
        raise UserError(sentence)

    def log_step(self, outcome: Outcome, progress: Progress) -> None:
        """Progress; where it is due, the losses of the step just done."""
        state, config = self.state, self.config
        progress.advance(config.train.batch_size, self.log.note)
        due = state.step == self.num_steps or state.step % config.train.log_every == 0
        if due or self.unseen.is_due():
            self.check()
        if due and outcome.applied:
            record = {
                "samples_seen": state.samples_seen,
                **self.record(list((outcome.sums / config.train.batch_size).cpu())),
                "lr": learning_rate(state.step - 1, self.num_steps, config.optimizer),
                "kl_weight": kl_weight(state.step - 1, config.objective),
                "gradient_norm": float(outcome.gradient_norm),
            }
            self.log.step(state.step, config.train.batch_size, record)
        if self.heart.is_due():
            self.beat("training")

    def end_epoch(self, progress: Progress) -> float:
        """Records and pictures; returns the test loss."""
        config, state = self.config, self.state
        self.check()
        epoch = state.samples_seen // len(self.train_set)
        with self.stopwatch("test"):
            loss, test_record = self.test()
        with self.stopwatch("log"):
            train_record = self.record(state.end_epoch())
            self.log.epoch(state.step, epoch, train_record, test_record)
            told = f"train {self.in_words(train_record)}; test {self.in_words(test_record)}"
            progress.say(f"epoch {epoch}/{config.train.epochs}: {told}")
        if self.here.is_main and (epoch % config.train.grid_every == 0 or state.step == self.num_steps):
            with self.stopwatch("pictures"):
                self.save_pictures(epoch)
        return loss

    def save_pictures(self, epoch: int) -> None:
        """Drawn now, written by a thread while training goes on."""
        self.finish_pictures()
        self._writing = (epoch, self._pictures.submit(self.draw_pictures(epoch)))

    def settle(self) -> None:
        """Until metrics and pictures are on the disk: no checkpoint outlives those that come before it."""
        writing = self._writing  # which the loop may clear meanwhile: this runs in the checkpoints' thread
        if writing is not None:
            wait([writing[1]])
        self.log.sync()

    def finish_pictures(self) -> None:
        """Waits for those being written; without them where the disk is full and training is to go on regardless."""
        if self._writing is None:
            return
        (epoch, writing), self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise
            print(f"warning: no pictures of epoch {epoch} ({error.strerror}), training goes on", flush=True)

    def beat(self, state: str, reason: str | None = None) -> None:
        """Says where the run is, to whoever looks from outside."""
        losses = {"loss_nats": self.log.loss_nats, "test_loss_nats": self.log.test_loss_nats}
        self.heart.beat(state, self.state.step, losses | {"reason": reason})

    def finish(self) -> None:
        """Exports what was trained, and says how fast that was."""
        told = self.export()
        self.beat("finished")
        num_images = (self.state.step - self.first_step) * self.config.train.batch_size
        if num_images:
            figures = efficiency(
                self.config, self.here.device, num_images, self.stopwatch, self.here.size, self.flops_per_image()
            )
            figures["in_a_line"] = in_a_line(figures)
            write_json(self.run.efficiency, figures)
            print(figures["in_a_line"], flush=True)
        print(told, flush=True)

    def close(self) -> None:
        """Closes the files and lets the next one into the run directory."""
        self.finish_pictures()
        self._pictures.shutdown()
        self.checkpoints.close()
        self.log.close()
        if self.lock is not None:
            self.lock.release()

    def run_to_end(self, stop: StopSignal) -> bool:
        """The loop, and what is done at its end; returns whether the last step was reached."""
        finished = self.loop(stop)
        if finished and self.here.is_main:
            self.finish()
        self.close()
        return finished

    def greeting(self, loaded: str | None) -> str:
        """What is about to happen, in a line."""
        here, train_config = self.here, self.config.train
        where = f"going on from {loaded}" if loaded else "starting"
        return (
            f"{self.run.path}: {where}, {self.num_steps} steps of {train_config.batch_size} images "
            f"({train_config.epochs} epochs of {len(self.train_set)}), {here.size} "
            f"{'process' if here.size == 1 else 'processes'} on {here.device.type}, {train_config.precision}, "
            f"images {PLACES[self.train_set.place]}"
        )
