"""Real images against real images: how large each figure is where nothing was generated, by the number of images.

    python -m benchmarks.floors SHARDS [--features random] [--nums 100 300 624 1000 2600]

Between the test and the train split, between two halves of the train split that share no patient, and the same within
each class, each at several numbers of images drawn at random. Prints a table; the intervals are those of `evaluate`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from cxr_vae.config import EvaluateConfig
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory, SplitIndex
from cxr_vae.distributed import world
from cxr_vae.evaluation.features import Features, choose_network, load_network
from cxr_vae.evaluation.image_sets import ImageSet, extract
from cxr_vae.evaluation.metrics import NAMES, compare
from cxr_vae.files import cache_folder

Rows = npt.NDArray[np.int64]


def features_of(index: SplitIndex, name: str, weights: str | None) -> Features:
    """Of a whole split."""
    dataset = XrayDataset(index, in_memory=False, workers=1)
    facts = {"split": index.split, "index_sha256": index.content_hash, "rows": "all"}
    root = cache_folder() / "features"
    images = ImageSet(
        index.split, len(index), lambda start, stop: (dataset.images(range(start, stop)), {}), facts, root
    )
    with world("auto") as here:
        found = extract(images, load_network(choose_network(name), here.device, weights), here)
    assert found is not None
    return Features(found["pooled"], found.get("logits"))


def pairs(train: SplitIndex, test: SplitIndex) -> Iterator[tuple[str, Rows, Rows, bool]]:
    """Name, rows of one side, rows of train, and whether the first side is test."""
    patients = np.array(train.texts("patient"))
    names, counts = np.unique(patients, return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    images = counts[order].cumsum()  # of the first patients of that order
    first = np.isin(patients, names[order[: np.abs(images - len(train) / 2).argmin() + 1]])
    every = np.arange(len(train))
    yield "test, train", np.arange(len(test)), every, True
    yield "train, train", every[first], every[~first], False
    for number, label in enumerate(train.classes):
        yield f"test, train: {label}", np.flatnonzero(test.labels == number), every[train.labels == number], True
        both = train.labels == number
        yield f"train, train: {label}", every[first & both], every[~first & both], False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--features", default="random")
    parser.add_argument("--features-weights")
    parser.add_argument("--nums", type=int, nargs="+", default=[100, 300, 624, 1000, 2600])
    arguments = parser.parse_args()

    directory = ShardDirectory.open(arguments.shards)
    splits = {name: directory.split(name) for name in ("train", "test")}
    found = {name: features_of(index, arguments.features, arguments.features_weights) for name, index in splits.items()}
    rng = np.random.default_rng(0)
    names = [name for name in NAMES if name != "score"]
    rows = []
    for name, left, right, is_test in pairs(splits["train"], splits["test"]):
        for num in arguments.nums:
            if num > min(len(left), len(right)):
                continue
            i, j = (np.sort(rng.permutation(side)[:num]) for side in (left, right))
            sides = (
                Features(found["test" if is_test else "train"].pooled[i], None),
                Features(found["train"].pooled[j], None),
            )
            figures = compare(*sides, EvaluateConfig())
            cells = [f"{figures[one].value:.3g} ± {1.96 * figures[one].standard_error:.2g}" for one in names]
            rows.append([name, num, *cells])
            print(".", end="", flush=True)
    print(f"\n\n{tabulate(rows, ['sets', 'N each', *names], tablefmt='github')}")


if __name__ == "__main__":
    main()
