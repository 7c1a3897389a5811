"""The rows of benchmarks/speed.py about what users would pick instead, where it is installed:

    pip install pythae lightning mosaicml-streaming

Trainers get the plain program's model, and images that are float32 in memory already: what is timed is theirs.
"""

import importlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.baseline import VAE, train_step, vae_loss
from benchmarks.speed import Row, interleaved, originals, ratios
from benchmarks.speed_loading import BATCH, CPU, NUM, cpu_seconds, ours
from benchmarks.speed_training import best_precision, run, train_command
from cxr_vae.data.dataset import XrayDataset, to_float
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.training.run_log import read_records

STEPS = 8  # an epoch


def installed(module: str, distribution: str) -> str | None:
    """Its name and version; says so where it is missing or broken."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package does when it is imported
        print(f"{distribution} left out: {error}", flush=True)
        return None
    return f"{distribution} {version(distribution)}"


def peers(source: Path, work: Path) -> list[Row]:
    """Trainers against the plain loop, a loader against ours from raw shards."""
    some = originals(source, work / "peers", BATCH * STEPS, BATCH)
    shards = write_shards(some, work / "peers_shards", Preprocessing(224, "stretch", "raw")).path
    dataset = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=True, workers=1)
    pixels = dataset.images(range(len(dataset)))
    return trainers(to_float(pixels, CPU), shards, work) + streaming(pixels, shards, work)


def trainers(images: Tensor, shards: Path, work: Path) -> list[Row]:
    """Wall time of the training steps of a second epoch, all cores."""
    tried: dict[str, Callable[[], float]] = {"plain": lambda: plain(images)}
    names = {}
    for key, module, distribution, measure in (
        ("pythae", "pythae.trainers", "pythae", lambda: pythae(images)),
        ("lightning", "lightning", "lightning", lambda: lightning(images)),
    ):
        if (name := installed(module, distribution)) is not None:
            names[key], tried[key] = name, measure
    if not names:
        return []
    precision = best_precision()

    def cxr_vae() -> float:
        shutil.rmtree(work / "peers_run", ignore_errors=True)
        options = (f"precision={precision}", "epochs=2", f"log_every={STEPS}", "loading=memory", "data.format=raw")
        run(train_command(shards, work / "peers_run", *options))
        spent = read_records(work / "peers_run" / "speed.jsonl")[1]
        return float(spent["step_s"] + spent["data_s"])

    found = interleaved(tried | {"ours": cxr_vae})
    names["ours"] = f"cxr_vae, {precision}"
    rates = {key: f"{BATCH * STEPS / sorted(found[key])[2]:.1f} images/s" for key in names}
    against = "plain loop, images in memory"
    return [
        Row(f"training, {name}", against, "", ratios(found["plain"], found[key]), note=rates[key])
        for key, name in names.items()
    ]


def plain(images: Tensor) -> float:
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        start = time.perf_counter()
        for (batch,) in DataLoader(TensorDataset(images), BATCH, shuffle=True):
            train_step(model, optimizer, batch)
        seconds = time.perf_counter() - start
    return seconds


def pythae(images: Tensor) -> float:
    from pythae import models
    from pythae.data.datasets import BaseDataset
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    logging.disable(logging.INFO)
    network = VAE()

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.mu, self.logvar = network.encoder, network.fc_mu, network.fc_logvar

        def forward(self, x: Tensor) -> Any:
            h = self.layers(x)
            return ModelOutput(embedding=self.mu(h), log_covariance=self.logvar(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z))

    seconds: list[float] = []

    class Clock(TrainingCallback):
        def on_epoch_begin(self, training_config: object, **more: object) -> None:
            seconds.append(-time.perf_counter())

        def on_epoch_end(self, training_config: object, **more: object) -> None:
            seconds[-1] += time.perf_counter()

    config = models.VAEConfig(input_dim=(1, 224, 224), latent_dim=128, reconstruction_loss="bce")
    model = models.VAE(config, encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        training = BaseTrainerConfig(
            output_dir=folder, num_epochs=2, per_device_train_batch_size=BATCH, learning_rate=1e-3, no_cuda=True
        )
        data = BaseDataset(images, torch.zeros(len(images)))
        BaseTrainer(model, train_dataset=data, training_config=training, callbacks=[Clock()]).train()
    return seconds[1]


def lightning(images: Tensor) -> float:
    from lightning import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae = VAE()

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return vae_loss(*(out := self.vae(batch[0]))[:1], batch[0], *out[1:]) / len(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    seconds: list[float] = []

    class Clock(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seconds[-1] += time.perf_counter()

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    batches = DataLoader(TensorDataset(images), BATCH, shuffle=True)
    Trainer(max_epochs=2, accelerator="cpu", callbacks=[Clock()], **quiet).fit(Module(), batches)
    return seconds[1]


def streaming(pixels: Tensor, shards: Path, work: Path) -> list[Row]:
    """CPU time an image, one thread, of mosaicml-streaming's loader and ours, both from undecoded arrays."""
    name = installed("streaming", "mosaicml-streaming")
    if name is None:
        return []
    from streaming import MDSWriter, StreamingDataset

    out = work / "mds"
    shutil.rmtree(out, ignore_errors=True)
    with MDSWriter(out=str(out), columns={"image": "ndarray:uint8:1,224,224"}) as writer:
        for image in pixels.numpy():
            writer.write({"image": image})

    def theirs() -> float:
        dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH)

        def batches() -> Iterable[Tensor]:
            while True:
                for batch in DataLoader(dataset, BATCH):
                    yield to_float(batch["image"], CPU)

        return cpu_seconds(batches(), 4 * NUM)

    torch.set_num_threads(1)
    read = XrayDataset(ShardDirectory.open(shards).split("train"), in_memory=False, workers=1)
    found = interleaved({"theirs": theirs, "ours": lambda: ours(read, 4 * NUM)})
    note = "; ".join(f"{key} {1e6 * sorted(spent)[2]:.0f} µs of CPU an image" for key, spent in found.items())
    return [Row("loading, raw shards", name, "", ratios(found["theirs"], found["ours"]), note=note)]
