"""What the images of runs are worth: one table, a row a run (and prior), every row the same measurement.

    python -m benchmarks.quality RUN [RUN …] [--priors standard gmm] [--data FOLDER] [--out quality.json]

Drives `cxr-vae prior` where a prior isn't fitted yet, `evaluate` and `audit` in one process, at as many generated as
test images, in the features of EfficientNet-Lite0 (benchmarks/lite0.py): no FID. The shards are those the runs were
trained on, or --shards; with --data, a folder of X-rays, they are made first where they are missing. Beside it, in the
same features, as many samples against as many training images (--num-train). What is found out about real images is
kept for the next run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from cxr_vae.audit.audit import audit
from cxr_vae.audit.samples import choose_samples
from cxr_vae.config import Config
from cxr_vae.config_file import override_config
from cxr_vae.data.dataset import open_split
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.distributed import world
from cxr_vae.evaluation.evaluate import MAY_OVERRIDE, evaluate
from cxr_vae.evaluation.features import load_network
from cxr_vae.evaluation.image_sets import extract, real_images, reconstructions, usable_cache
from cxr_vae.evaluation.metrics import called, frechet_distance
from cxr_vae.files import read_json, sha256_of
from cxr_vae.noise import BLOCK
from cxr_vae.run_dir import RunDir
from cxr_vae.training.efficiency import flops_per_image
from cxr_vae.training.fit_prior import fit_prior
from cxr_vae.training.run_log import read_epochs, read_records
from cxr_vae.weights import load_vae

FEATURES = "benchmarks.lite0:lite0"

COLUMNS = {
    "run": "run",
    "prior": "prior",
    "seed": "seed",
    "epochs": "epochs",
    "num_images_seen": "images seen",
    "wall_s": "training, s",
    "device": "device",
    "gflop_per_image": "GFLOP an image",
    "reconstructions": "reconstructions",
    "samples": "samples",
    "ratio": "samples ÷ reconstructions",
    "reconstructed_train": "reconstructed train",
    "floor": "real train (floor)",
    "samples_to_train": "samples to train",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "negative_elbo_nats": "-ELBO, nats",
    "active_units": "active units",
    "audit": "audit",
    "lowest_p": "its lowest p",
}
"""Keys of a row and what they are called in the table."""


def shards_of(data: Path | None, shards: Path, preprocessing: Preprocessing) -> ShardDirectory:
    """The shards, made of `data` first if that is given; nothing is done where they are finished."""
    return write_shards(data, shards, preprocessing) if data else ShardDirectory.open(shards)


def measure(run: RunDir, options: Sequence[str], num_train: int) -> dict[str, Any]:
    """One row, from what `evaluate` and `audit` wrote and the distance to training images."""
    config = override_config(run.saved_config(), options, MAY_OVERRIDE)
    num_train = min(num_train, len(open_split(config.data, config.data.train_split)))  # what the row will say
    results = evaluate(run, options)
    record = audit(run, options)
    network = config.evaluate.features
    distance = called("frechet", network)
    again, figures = results["reconstructions"]["figures"], results["figures"][distance]
    samples, reconstructions = figures["value"], again[distance]["value"]
    return {
        "run": str(run.path),
        "prior": results["generated"].get("prior"),
        **training_facts(run, config),
        "num": results["num_generated"],
        "num_real": results["num_real"],
        "reconstructions": reconstructions,
        "samples": samples,
        "samples_interval_95": figures["interval_95"],
        "ratio": samples / reconstructions,
        "floor": figures["floor"],
        "reconstructed_train": distance_of_reconstructed_training_images(run, config),
        "samples_to_train": distance_to_training(run, config, num_train),
        "num_train": num_train,
        **{name: again[name]["value"] for name in ("psnr_db", "ssim")},
        **{name: figure["value"] for name, figure in results["likelihood"].items()},
        "active_units": f"{results['latent']['active_units']} of {results['latent']['num_units']}",
        "audit": "FLAG" if record["flag"] else "quiet",
        "lowest_p": lowest_p(record),
        "audit_reason": record["reason"],
        "spaces": {
            name: {"p_copies": one["p_copies"], "p_share": one["p_share"], **one["share"]}
            for name, one in record["spaces"].items()
        },
        "features": results["features"],
        "index_sha256": results["real"]["index_sha256"],
        "run_weights_sha256": results["request"]["run_weights_sha256"],
        "versions": results["versions"],
    }


def training_facts(run: RunDir, config: Config) -> dict[str, Any]:
    """What training took: the recorded seconds of all its stretches, whose clocks start anew."""
    epochs = len(read_epochs(run))
    seconds = [float(line["elapsed_s"]) for line in read_records(run.speed)]
    ends = [now for now, later in zip(seconds, [*seconds[1:], 0.0], strict=True) if later < now]
    return {
        "seed": config.seed,
        "epochs": epochs,
        "num_images_seen": epochs * len(open_split(config.data, config.data.train_split)),
        "wall_s": round(sum(ends), 1),
        "device": read_json(run.efficiency, hint="train on")["device"] if run.efficiency.is_file() else None,
        "gflop_per_image": flops_per_image(config) / 1e9,
    }


def distance_to_training(run: RunDir, config: Config, num: int) -> float:
    """Fréchet distance of `num` samples to as many training images, the same ones for all runs."""
    options = [f"evaluate.num_generated={num}"]
    with world(config.device) as here:
        network = load_network(config.evaluate.features, here.device, config.evaluate.features_weights)
        samples = choose_samples(run, override_config(config, options, MAY_OVERRIDE), None, here)
        parts = [network(samples.fetch(start, min(start + BLOCK, num))).pooled for start in range(0, num, BLOCK)]
        index = open_split(config.data, config.data.train_split)
        of_all = config.model_copy(update={"seed": 0})
        real = extract(real_images(index, num, of_all, None, usable_cache(run)), network, here)
    assert real is not None
    return frechet_distance(torch.cat(parts).numpy(), real["pooled"].numpy())


def distance_of_reconstructed_training_images(run: RunDir, config: Config) -> float:
    """To the test images, as many as samples are: about what a prior that fits perfectly would get."""
    with world(config.device) as here:
        network = load_network(config.evaluate.features, here.device, config.evaluate.features_weights)
        model, _ = load_vae(run.weights, here.device)
        train, test = (open_split(config.data, name) for name in (config.data.train_split, config.evaluate.real_split))
        num, weights_sha256 = min(config.evaluate.num_generated, len(train)), sha256_of(run.weights)
        again = extract(reconstructions(train, num, run, model, config, weights_sha256, here.device), network, here)
        real = extract(real_images(test, config.evaluate.num_real, config, None, usable_cache(run)), network, here)
    assert again is not None
    assert real is not None
    return frechet_distance(again["pooled"].numpy(), real["pooled"].numpy())


def lowest_p(record: dict[str, Any]) -> float:
    """Of the audit's tests that may raise its flag."""
    spaces = record["spaces"].values()
    copies = [one["p_copies"] for one in spaces]
    return min(copies + [one["p_share"] for one in spaces if not one["held_out_differs"]])


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown, with the numbers of images that the distances are of."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    cells = [[cell(row[name]) for name in COLUMNS] for row in rows]
    table = tabulate(cells, COLUMNS.values(), tablefmt="github", disable_numparse=True)
    sizes = sorted({(row["num"], row["num_real"], row["num_train"]) for row in rows})
    said = "; ".join(f"{num} images against {real} of test, {train} against train" for num, real, train in sizes)
    networks = sorted({row["features"]["network"] for row in rows})
    return f"{table}\n\nFréchet distances in the features of {', '.join(networks)}: {said}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory")
    parser.add_argument("--priors", nargs="+", metavar="NAME", help="a row for each (default: the run's own)")
    parser.add_argument("--data", type=Path, help="folder of X-rays")
    parser.add_argument("--shards", type=Path, help="(default: those each run was trained on)")
    parser.add_argument("--num", type=int, default=624, help="generated, test and floor images")
    parser.add_argument("--num-train", type=int, default=1000, help="samples and training images")
    parser.add_argument("--importance-samples", type=int, default=1, help="latents an image of the tighter bound")
    parser.add_argument("--features", default=FEATURES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    arguments = parser.parse_args()

    rows = []
    for path in arguments.runs:
        run = RunDir(path)
        data = run.saved_config().data
        shards = arguments.shards or Path(data.shards)
        shards_of(arguments.data, shards, Preprocessing(data.image_size, data.fit, data.format))
        where = [f"data.shards={shards}", f"device={arguments.device}"]
        options = [
            *where,
            f"evaluate.features={arguments.features}",
            *(f"evaluate.{name}={arguments.num}" for name in ("num_generated", "num_real")),
            *("evaluate.real_split=test", "evaluate.floor_split=train", "evaluate.is_splits=1"),
            f"evaluate.importance_samples={arguments.importance_samples}",
        ]
        for prior in arguments.priors or [None]:
            of_prior = [f"prior.name={prior}"] if prior else []
            if not run.prior(prior or run.saved_config().prior.name).is_file():  # one of other options is as good
                fit_prior(run, [*where, *of_prior])
            rows.append(measure(run, [*options, *of_prior], arguments.num_train))
            arguments.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{table_of(rows)}\n\n{arguments.out}")


if __name__ == "__main__":
    main()
