"""What `cxr-vae audit` says of sets whose memorisation is known: real images, training images, planted copies.

    python -m benchmarks.memorisation SOURCE WORK [--num 300] [--train-share 0.8] [--features random]

SOURCE is Kaggle's chest-xray-pneumonia. In WORK its training patients are divided into train (80 %), held (10 %) and
new (10 %), its test split stays as it is, and all of it is sharded. Each set is 300 PNGs that are audited against
train, with held or with the shifted test split as held-out images. A second call goes on where the first was.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from cxr_vae.audit.audit import audit
from cxr_vae.config_file import dump_config, load_config
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.sources import patient_of
from cxr_vae.data.tars import Preprocessing
from cxr_vae.files import write_atomically
from cxr_vae.run_dir import RunDir

PLANTED = 0.05


def divide(source: Path, target: Path, train_share: float) -> None:
    """Links of SOURCE's images: its train split by patient, its test split as it is; what is too much is left out."""
    if target.exists():
        return
    images = sorted(source.glob("train/*/*.jpeg"))
    patients = sorted({patient_of(path.stem) for path in images})
    order = np.random.default_rng(0).permutation(len(patients))
    tenth = len(patients) // 10
    ends = {"held": tenth, "new": 2 * tenth, "train": 2 * tenth + int(train_share * len(patients))}
    split_of = {
        patients[number]: next((split for split, end in ends.items() if place < end), None)
        for place, number in enumerate(order)
    }
    for path in images + sorted(source.glob("test/*/*.jpeg")):
        split = "test" if path.parent.parent.name == "test" else split_of[patient_of(path.stem)]
        if split is None:
            continue
        link = target / split / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def moved(images: Tensor) -> Tensor:
    """3 px to the right and 2 px up, the border repeated."""
    padded = torch.nn.functional.pad(images.float(), (3, 0, 0, 2), mode="replicate")
    return padded[..., 2:, :-3].to(torch.uint8)


def brighter(images: Tensor) -> Tensor:
    """15 % more contrast and 12 grey levels more."""
    return (images.float() * 1.15 + 12).clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor) -> Tensor:
    """As a VAE's samples are: by a Gaussian of 4 px."""
    return gaussian_blur(images, [25, 25], [4.0, 4.0])


def all_three(images: Tensor) -> Tensor:
    return blurred(brighter(moved(images)))


def unchanged(images: Tensor) -> Tensor:
    return images


class Sets:
    """Folders of PNGs made from the shards, with the training image each copy is of."""

    def __init__(self, shards: Path, work: Path, num: int) -> None:
        directory = ShardDirectory.open(shards)
        self.splits = {
            name: XrayDataset(directory.split(name), in_memory=False, workers=1)
            for name in ("train", "held", "new", "test")
        }
        self.work, self.num = work, num

    def draw(self, split: str, num: int) -> tuple[Tensor, list[str]]:
        """Images of a split and their keys, the same at each call."""
        dataset = self.splits[split]
        rows = np.sort(np.random.default_rng(1).permutation(len(dataset))[:num])
        return dataset.images(rows), dataset.index.texts("key", [int(row) for row in rows])

    def real(self, name: str, split: str, change: Callable[[Tensor], Tensor] = unchanged) -> Path:
        return self.write(name, {"real": change(self.draw(split, self.num)[0])})

    def planted(self, name: str, change: Callable[[Tensor], Tensor]) -> tuple[Path, dict[str, str]]:
        """95 % new images and 5 % changed training images; the files of these and their keys."""
        num_copies = round(PLANTED * self.num)
        copies, keys = self.draw("train", num_copies)
        new, _ = self.draw("new", self.num - num_copies)
        folder = self.write(name, {"new": new, "copy": change(copies)})
        return folder, {f"copy-{number:04d}.png": key for number, key in enumerate(keys)}

    def write(self, name: str, parts: dict[str, Tensor]) -> Path:
        folder = self.work / "sets" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, images in parts.items():
            for number, image in enumerate(images):
                Image.fromarray(image[0].numpy()).save(folder / f"{part}-{number:04d}.png")
        return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--train-share", type=float, default=0.8, help="of the patients")
    parser.add_argument("--features", default="random")
    arguments = parser.parse_args()
    work: Path = arguments.work
    divide(arguments.source, work / "images", arguments.train_share)
    write_shards(work / "images", work / "shards", Preprocessing(224), workers=1)
    config = load_config(None, [f"data.shards={work / 'shards'}", f"run_dir={work / 'run'}", "device=cpu"])
    run = RunDir(Path(config.run_dir))
    run.path.mkdir(exist_ok=True)
    write_atomically(run.config, dump_config(config))
    sets = Sets(work / "shards", work, arguments.num)
    nothing: dict[str, str] = {}
    trials = [
        ("5 % exact copies", "held", *sets.planted("exact", unchanged), True),
        ("real, other patients", "held", sets.real("new", "new"), nothing, False),
        ("5 % copies moved by 3 and 2 px", "held", *sets.planted("moved", moved), True),
        ("5 % copies brightened", "held", *sets.planted("brighter", brighter), True),
        ("the training images", "held", sets.real("train", "train"), nothing, True),
        ("real, Kaggle's test split", "held", sets.real("test", "test"), nothing, False),
        ("real, other patients, blurred", "held", sets.real("blurred", "new", blurred), nothing, False),
        ("5 % copies moved, brightened, blurred", "held", *sets.planted("all", all_three), True),
        ("real, other patients", "test", sets.real("new", "new"), nothing, False),
        ("real, other patients, blurred", "test", sets.real("blurred", "new", blurred), nothing, False),
    ]
    rows, right = [], True
    for name, held_out, folder, copies, loud in trials:
        record = trial(run, folder, held_out, work / "found" / f"{folder.name}-{held_out}", arguments.features)
        right &= record["flag"] == loud
        rows += rows_of(name, held_out, record, copies)
        print(tabulate(rows, HEADERS, tablefmt="github"), flush=True)
    print("every flag as it should be" if right else "A FLAG IS WRONG")
    return 0 if right else 1


def trial(run: RunDir, folder: Path, held_out: str, out: Path, features: str) -> dict:
    """The record of one audit; of an earlier call, if that finished it."""
    if not (out / "memorisation.json").is_file():
        audit(run, [f"features={features}"], images=folder, held_out=held_out, out=out)
    return json.loads((out / "memorisation.json").read_text())


HEADERS = [
    *("samples", "held out", "flag", "space", "below the 1 % limit, %", "p (copies)", "copies named"),
    *("share, %", "p (share)", "share of training, %", "below held-out 1 %, %", "C_T"),
]


def rows_of(name: str, held_out: str, record: dict, copies: dict[str, str]) -> list[list]:
    """A row a space; how many of the planted copies are suspects beside the image they are of."""
    rows = []
    for row in record["tables"][0]["rows"]:
        space, below, p_copies, share, p_share, of_training, below_held_out, c_t = row
        named = [pair for pair in record["closest_pairs"] if pair["space"] == space and pair["is_suspect"]]
        right = sum(copies.get(pair["sample"]) == pair["key"] for pair in named)
        flag, of_copies = ("raised" if record["flag"] else "quiet"), f"{right} of {len(copies)}" if copies else ""
        measured = [share, p_share, of_training, below_held_out, c_t]
        rows.append([name, held_out, flag, space, below, p_copies, of_copies, *measured])
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
