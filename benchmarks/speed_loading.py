"""The rows of benchmarks/speed.py about images: loading and sharding."""

import io
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.speed import Row, interleaved, originals, ratios
from cxr_vae.data.dataset import XrayDataset, read_ahead, to_float
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.stream import TrainingStream
from cxr_vae.data.tars import Preprocessing

CPU = torch.device("cpu")
BATCH = 32
NUM = 320  # images a round, but for the plain loader


def cpu_seconds(batches: Iterable[torch.Tensor], num: int) -> float:
    """CPU time an image, of all threads of this process, to the end of `num` images."""
    start = time.process_time()
    seen = 0
    for images in batches:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (1, 224, 224)
        seen += len(images)
        if seen >= num:
            break
    assert seen >= num
    return (time.process_time() - start) / seen


def ours(dataset: XrayDataset, num: int) -> float:
    """Our loader at a random place of the stream."""
    stream = TrainingStream(len(dataset), seed=0)
    slices = (stream.rows(start, start + BATCH) for start in range(0, num, BATCH))
    with read_ahead(dataset, slices) as batches:
        return cpu_seconds((to_float(images, CPU) for images in batches), num)


def folder(root: Path, *before: object) -> DataLoader:
    """torchvision's ImageFolder, no workers, so that all of its time is this process's."""
    transform = transforms.Compose([transforms.Grayscale(), *before, transforms.ToTensor()])
    return DataLoader(ImageFolder(str(root), transform), BATCH, shuffle=True)


def textbook(tars: Path) -> Iterable[torch.Tensor]:
    """webdataset as its documentation shows it."""
    urls = [str(path) for path in sorted(tars.glob("train-*.tar"))]
    to_tensor = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000).decode("pil")
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(to_tensor, int).batched(BATCH)
    return (images for images, _ in dataset)


def loading(source: Path, work: Path) -> list[Row]:
    """CPU time an image, one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    some = originals(source, work / "some", 384, 64)
    shards = {
        format: write_shards(some, work / f"shards_{format}", Preprocessing(224, "stretch", format)).path  # type: ignore[arg-type]
        for format in ("raw", "jpg", "png")
    }
    small = work / "resized"
    index = ShardDirectory.open(shards["png"]).split("train")
    resident = XrayDataset(index, in_memory=True, workers=1)
    for image, name in zip(resident.images(range(len(index))), index.texts("source"), strict=True):
        path = (small / Path(name).relative_to("train")).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    read = {
        format: XrayDataset(ShardDirectory.open(path).split("train"), in_memory=False, workers=1)
        for format, path in shards.items()
    }
    plain_images = folder(some / "train", transforms.Resize((224, 224)))
    found = interleaved(
        {
            "plain": lambda: cpu_seconds((x for x, _ in plain_images), 64),
            "folder": lambda: cpu_seconds((x for x, _ in folder(small)), NUM),
            "textbook": lambda: cpu_seconds(textbook(shards["jpg"]), NUM),
            "resident": lambda: ours(resident, 20 * NUM),
            **{format: (lambda dataset=dataset: ours(dataset, NUM)) for format, dataset in read.items()},  # type: ignore[misc]
        }
    )
    torch.set_num_threads(num_threads)

    def row(what: str, name: str, against: str = "plain", target: str = "") -> Row:
        spent = sorted(found[name])[len(found[name]) // 2]
        against_name = {"plain": "plain loading from originals", "textbook": "webdataset's textbook, JPEG shards"}
        return Row(
            f"loading, {what}", against_name[against], target, ratios(found[against], found[name]),
            note=f"{1e3 * spent:.3f} ms of CPU an image",
        )  # fmt: skip

    return [
        row("resident", "resident", target="≥100"),
        row("raw shards", "raw", target="≥40"),
        row("raw shards", "raw", "textbook", "≥5"),
        row("JPEG shards", "jpg"),
        row("JPEG shards", "jpg", "textbook"),
        row("PNG shards", "png"),
        row("torchvision's ImageFolder, resized PNGs", "folder"),
        row("webdataset's textbook", "textbook"),
    ]


PLAIN_SHARDING = """
import io, sys
from pathlib import Path
import webdataset
from PIL import Image
files = sorted(Path(sys.argv[1]).rglob("*.*"))
with webdataset.ShardWriter(sys.argv[2] + "/train-%06d.tar", maxcount=64, verbose=0) as sink:
    for number, path in enumerate(files):
        image = Image.open(path).convert("L").resize((224, 224), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        sink.write({"__key__": f"{number:06d}", "png": buffer.getvalue(), "cls": path.parent.name})
"""


def sharding(source: Path, work: Path) -> list[Row]:
    """Wall time of the whole command; every pixel as PIL's decoder and antialiased bilinear filter make it."""
    many = originals(source, work / "many", 752, 16)
    out = work / "sharded"

    def timed(call: list[str]) -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start = time.perf_counter()
        subprocess.run([sys.executable, *call], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    found = interleaved(
        {
            "plain": lambda: timed(["-c", PLAIN_SHARDING, str(many), str(out)]),
            "ours": lambda: timed(["-m", "cxr_vae", "shard", str(many), str(out / "shards")]),
        }
    )
    per_s = 768 / sorted(found["ours"])[len(found["ours"]) // 2]
    exact = ShardDirectory.open(out / "shards").split("test")
    stored = XrayDataset(exact, in_memory=False, workers=1).images(range(len(exact))).numpy()
    for image, name in zip(stored, exact.texts("source"), strict=True):
        original = Image.open(io.BytesIO((many / name).read_bytes())).convert("L")
        assert np.array_equal(image[0], np.asarray(original.resize((224, 224), Image.Resampling.BILINEAR)))
    note = f"{per_s:.0f} images/s"
    return [
        Row("sharding to PNG, all cores, same pixels", "one plain process", "≥1.9", ratios(*found.values()), note=note)
    ]
