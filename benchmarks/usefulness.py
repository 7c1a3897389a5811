"""Do generated images mean what their label says? A classifier of it, trained on real or on generated ones, tells.

    cxr-vae generate RUN --prior gmm --label NORMAL --num 1341 --out made/NORMAL      (and PNEUMONIA, 3875)
    python -m benchmarks.usefulness --generated made --shards shards/kaggle_224 [--seeds 3] [--out usefulness.json]

Three figures, for each seed: (a) the AUC on the real test images of a ResNet-18 (He et al. 2016, from scratch) trained
on the real training images; (b) what it makes of the generated images of each label; (c) the AUC on the real test
images of the same network trained on generated images only, as many of each label (Ravuri and Vinyals 2019 call it the
classification accuracy score), and its ratio to (a). Without --generated (a) alone. With --data, a folder of X-rays,
the shards are made first. All images stay on the device, at 112 x 112 pixels.
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import torchvision
from scipy.stats import mannwhitneyu, norm
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.quality import shards_of
from cxr_vae.audit.samples import Samples, from_folder
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import SplitIndex
from cxr_vae.data.tars import Preprocessing
from cxr_vae.errors import UserError
from cxr_vae.noise import BLOCK
from cxr_vae.workers import num_cores

POSITIVE = "PNEUMONIA"
SIDE = 112
BATCH = 128
SHIFT = 0.06
"""Of the side of an image, at most, in each direction."""
BRIGHTNESS, CONTRAST = 0.1, 0.15


class Labelled(NamedTuple):
    """N images (N, 1, S, S) uint8 and whether each is PNEUMONIA (N,) float32, on one device."""

    images: Tensor
    labels: Tensor


def shrunk(images: Tensor, device: torch.device) -> Tensor:
    """(N, 1, H, W) uint8 on the device, at most 112 x 112, each pixel the mean over its area."""
    side = min(SIDE, images.shape[-1])
    parts = [F.adaptive_avg_pool2d(part.to(device).float(), side).round().byte() for part in images.split(512)]
    return torch.cat(parts)


def real(index: SplitIndex, device: torch.device) -> Labelled:
    """A whole split."""
    dataset, rows = XrayDataset(index, in_memory=True, workers=num_cores(1)), np.arange(len(index))
    dataset.decode_all(rows)
    labels = torch.from_numpy(index.labels.astype(np.int64) == index.classes.index(POSITIVE))
    return Labelled(shrunk(dataset.images(rows), device), labels.float().to(device))


def generated(folder: Path, image_size: int, counts: dict[str, int], device: torch.device) -> Labelled:
    """The first `counts[label]` PNGs of each folder/label; UserError where there are fewer."""
    images, labels = [], []
    for label, count in counts.items():
        samples = from_folder(folder / label, image_size)
        if len(samples.names) < count:
            raise UserError(f"{folder / label} holds {len(samples.names)} PNGs, and training has {count}: make as many")
        images.append(shrunk(decoded(samples, count), device))
        labels.append(torch.full((count,), float(label == POSITIVE), device=device))
    return Labelled(torch.cat(images), torch.cat(labels))


def decoded(samples: Samples, count: int) -> Tensor:
    """(count, 1, H, W) uint8, read by several threads."""

    def fetch(start: int) -> Tensor:
        return samples.fetch(start, min(start + BLOCK, count))

    with ThreadPoolExecutor(num_cores(1)) as pool:
        return torch.cat(list(pool.map(fetch, range(0, count, BLOCK))))


def network() -> nn.Module:
    """ResNet-18 with random weights, one channel in and one logit out."""
    model = torchvision.models.resnet18(weights=None, num_classes=1)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model.to(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, S, S) uint8 as float32 about 0, each moved by up to 6 % and a little brighter or darker."""
    draws = torch.rand(len(images), 4, device=images.device, generator=generator) * 2 - 1
    moves = torch.zeros(len(images), 2, 3, device=images.device)
    moves[:, 0, 0] = moves[:, 1, 1] = 1
    moves[:, :, 2] = 2 * SHIFT * draws[:, :2]  # the side is 2 in these coordinates
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    moved = F.grid_sample(scaled(images), grid, padding_mode="border", align_corners=False)
    return moved * (1 + CONTRAST * draws[:, 2, None, None, None]) + BRIGHTNESS * draws[:, 3, None, None, None]


def scaled(images: Tensor) -> Tensor:
    """uint8 as float32, -1 … 1."""
    return images.float() / 127.5 - 1


def train(data: Labelled, seed: int, epochs: int, precision: torch.dtype) -> nn.Module:
    """A classifier, a function of data and seed: AdamW, one cosine with a warm-up of a tenth, batches of 128."""
    device = data.images.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = network().to(device).train()
    batch = min(BATCH, len(data.labels))
    per_epoch = len(data.labels) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), device=device, generator=generator)
        for rows in order[: per_epoch * batch].split(batch):
            images = augmented(data.images[rows], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = model(images)
            loss = F.binary_cross_entropy_with_logits(logits.float()[:, 0], data.labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor) -> npt.NDArray[np.float64]:
    """(N,) of PNEUMONIA, in float32."""
    parts = [model(scaled(part))[:, 0].sigmoid() for part in images.split(512)]
    found: npt.NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return found


def area(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """The area under the ROC curve with its 95 % interval (DeLong et al. 1988, on the logit's scale)."""
    yes, no = scores[labels], scores[~labels]
    auc = float(mannwhitneyu(yes, no).statistic) / (len(yes) * len(no))
    wins = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    deviation = np.sqrt(wins.mean(1).var(ddof=1) / len(yes) + wins.mean(0).var(ddof=1) / len(no))
    if auc in (0.0, 1.0):
        return auc, auc, auc
    around = np.log(auc / (1 - auc)) + np.array([-1, 1]) * norm.ppf(0.975) * deviation / (auc * (1 - auc))
    low, high = 1 / (1 + np.exp(-around))
    return auc, float(low), float(high)


def trial(seed: int, of_train: Labelled, of_test: Labelled, made: Labelled | None, epochs: int) -> dict[str, Any]:
    """The three figures of a seed."""
    began = time.perf_counter()
    precision = torch.bfloat16 if of_train.images.is_cuda else torch.float32
    labels = of_test.labels.bool().cpu().numpy()
    judge = train(of_train, seed, epochs, precision)
    auc, *interval = area(probabilities(judge, of_test.images), labels)
    row: dict[str, Any] = {"seed": seed, "auc_real": auc, "auc_real_95": interval}
    if made is not None:
        asked = made.labels.bool().cpu().numpy()
        scores = probabilities(judge, made.images)
        pupil = train(made, seed, epochs, precision)
        auc, *interval = area(probabilities(pupil, of_test.images), labels)
        row |= {
            "as_asked_normal": float((scores[~asked] < 0.5).mean()),
            "as_asked_pneumonia": float((scores[asked] >= 0.5).mean()),
            "probability_normal": float(scores[~asked].mean()),
            "probability_pneumonia": float(scores[asked].mean()),
            "auc_of_labels": area(scores, asked)[0],
            "auc_generated": auc,
            "auc_generated_95": interval,
            "ratio": auc / row["auc_real"],
        }
    return row | {"seconds": round(time.perf_counter() - began, 1)}


HEADERS = {
    "seed": "seed",
    "auc_real": "AUC, trained on real",
    "as_asked_normal": "generated NORMAL called so",
    "as_asked_pneumonia": "generated PNEUMONIA called so",
    "probability_normal": "mean p(PNEUMONIA) of generated NORMAL",
    "probability_pneumonia": "… of generated PNEUMONIA",
    "auc_of_labels": "AUC of the labels asked for",
    "auc_generated": "AUC, trained on generated",
    "ratio": "÷ trained on real",
}


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown, a row a seed."""

    def cell(row: dict[str, Any], name: str) -> str:
        around = row.get(f"{name}_95")
        text = f"{row[name]:.4g}" if name != "seed" else str(row[name])
        return f"{text} ({around[0]:.3f} … {around[1]:.3f})" if around else text

    names = [name for name in HEADERS if name in rows[0]]
    cells = [[cell(row, name) for name in names] for row in rows]
    return tabulate(cells, [HEADERS[name] for name in names], tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("shards/kaggle_224"), help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of X-rays")
    parser.add_argument("--generated", type=Path, help="folder with NORMAL/*.png and PNEUMONIA/*.png")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, …: so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("usefulness.json"))
    arguments = parser.parse_args()

    began = time.perf_counter()
    device = torch.device(arguments.device)
    directory = shards_of(arguments.data, arguments.shards, Preprocessing(224))
    indexes = {split: directory.split(split) for split in ("train", "test")}
    if len(indexes["train"].classes) != 2 or POSITIVE not in indexes["train"].classes:
        raise SystemExit(f"{arguments.shards}: this is for {POSITIVE} and one other class")
    counts = directory.manifest["splits"]["train"]["count_per_class"]
    of_train, of_test = (real(index, device) for index in indexes.values())
    size = int(directory.manifest["image_size"])
    made = generated(arguments.generated, size, counts, device) if arguments.generated else None
    read = round(time.perf_counter() - began, 1)
    rows = []
    for seed in range(arguments.seeds):
        rows.append(trial(seed, of_train, of_test, made, arguments.epochs))
        print(rows[-1], flush=True)
    facts = {
        "generated": str(arguments.generated),
        "num_train": counts,
        "num_test": len(of_test.labels),
        "index_sha256": {split: index.content_hash for split, index in indexes.items()},
        "epochs": arguments.epochs,
        "side": int(of_train.images.shape[-1]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "reading_s": read,
    }
    arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    print(f"\n{table_of(rows)}\n\n{arguments.out}")


if __name__ == "__main__":
    main()
