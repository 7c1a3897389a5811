"""Training of a VAE: `cxr-vae train`."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from cxr_vae.config import Config
from cxr_vae.data.dataset import Rows, XrayDataset, check_classes, open_dataset, open_split
from cxr_vae.distributed import World, world
from cxr_vae.files import write_json
from cxr_vae.losses.elbo import Losses
from cxr_vae.models import VAE, build_model
from cxr_vae.noise import normal
from cxr_vae.pictures import save_loss_curves
from cxr_vae.run_dir import RunDir
from cxr_vae.stopping import StopSignal
from cxr_vae.training.compilation import share_compiled
from cxr_vae.training.efficiency import flops_per_image
from cxr_vae.training.loop import Loop
from cxr_vae.training.run_log import loss_record, read_epochs
from cxr_vae.training.schedules import kl_weight
from cxr_vae.training.vae_step import VaeStep
from cxr_vae.training.validation import draw_grids, test_losses
from cxr_vae.weights import hyperparameters, save_vae, set_aside


def train(config: Config) -> bool:
    """Trains up to the last step, going on from the newest checkpoint where there is one.

    Returns whether it got there: False where it was asked to stop, after saving a checkpoint. Raises UserError for a
    run directory, shards or options that don't fit together, before anything is written.
    """
    run = RunDir(Path(config.run_dir))
    run.check(config)
    share_compiled()
    patience = timedelta(minutes=config.train.stall_minutes)
    with StopSignal(config.train.max_minutes) as stop, world(config.device, patience) as here:
        # Nothing here holds on to it, so that DistributedDataParallel is gone before the process group is: its
        # destructor, if it held the last reference to a gloo group, would wait with Python's lock for a thread that
        # waits for this lock.
        return Training(config, run, here).run_to_end(stop)


class Training(Loop):
    """One attempt at a run of a VAE."""

    train_set: XrayDataset
    test_set: XrayDataset

    def __init__(self, config: Config, run: RunDir, here: World) -> None:
        self.indexes = [open_split(config.data, name) for name in (config.data.train_split, config.data.test_split)]
        check_classes(config, self.indexes[0])
        super().__init__(config, run, here)

    @property
    def vae(self) -> VAE:
        """The weights to test and to export: the average where there is one."""
        return cast(VAE, self.state.averaged_model)

    def open_sets(self) -> tuple[XrayDataset, XrayDataset]:
        """See Loop.open_sets."""
        train_set, test_set = (open_dataset(self.config.data, index, self.here) for index in self.indexes)
        return train_set, test_set

    def build_network(self) -> VAE:
        """See Loop.build_network."""
        return build_model(self.config)

    def make_step(self, model: nn.Module) -> VaeStep:
        """See Loop.make_step."""
        return VaeStep(self.config, self.state, model, self.here)

    def batch(self, images: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """See Loop.batch: with noise and classes."""
        device = self.here.device
        noise = normal(self.config.seed, "train", start, stop, self.vae.latent_shape, device)
        told: Sequence[int] | Rows = ()  # nobody looks at the classes
        if self.config.model.num_classes:
            told = self.stream.rows(start, stop)
        return images, noise, self.train_set.labels(told, device)

    def record(self, means: Sequence[Tensor]) -> dict[str, float]:
        """See Loop.record."""
        weight = kl_weight(self.state.step - 1, self.config.objective)
        record = loss_record(Losses(*means[:2]), weight, self.config.data.image_size)
        return record | ({"discriminator_loss": float(means[2])} if len(means) > 2 else {})

    def in_words(self, record: Mapping[str, float]) -> str:
        """See Loop.in_words."""
        return (
            f"{record['loss_nats']:.1f} nats/image (reconstruction {record['reconstruction_nats']:.1f}, "
            f"KL {record['kl_nats']:.1f}, {record['bits_per_dim']:.3f} bits/dim)"
        )

    def test(self) -> tuple[float, dict[str, float]]:
        """See Loop.test: checkpoints are compared by the negative ELBO."""
        losses = test_losses(self.vae, self.test_set, self.config, self.here)
        return float(losses.total()), self.record(losses)

    def draw_pictures(self, epoch: int) -> Callable[[], None]:
        """See Loop.draw_pictures: samples and reconstructions."""
        return draw_grids(self.run, epoch, self.vae, self.test_set, self.config, self.here.device)

    def set_aside(self) -> None:
        """See Loop.set_aside."""
        set_aside(self.run.weights)

    def export(self) -> str:
        """See Loop.export: the weights, with the curves and hyperparameters that belong to them.

        Weights that are there are of this step, since `set_aside` renames others. They stay as they are: priors and
        figures belong to the file's very bytes, and options that may change later are among them.
        """
        config, state, run = self.config, self.state, self.run
        epochs = read_epochs(run)
        if epochs:
            save_loss_curves(run.curves, epochs)
        sizes = {"num_train_images": len(self.train_set), "num_test_images": len(self.test_set)}
        write_json(run.path / "hyperparameters.json", hyperparameters(config, self.vae) | sizes)
        classes = list(self.train_set.index.classes)
        if not run.weights.is_file():
            seen = state.samples_seen
            save_vae(run.weights, self.vae, config, step=state.step, samples_seen=seen, classes=classes)
        return f"trained weights: {run.weights}"

    def flops_per_image(self) -> int:
        """See Loop.flops_per_image."""
        return flops_per_image(self.config)
