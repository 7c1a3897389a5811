"""Generated images against real ones: `cxr-vae evaluate`, a job of its own, never part of training.

Every rank makes or reads its part of the images, writes them as PNGs and extracts their features; the first rank puts
the features in order, computes the figures and writes `evaluation_results.json` last.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor

from cxr_vae.config import Config
from cxr_vae.config_file import PRIOR_OPTIONS, override_config
from cxr_vae.data.dataset import check_classes, open_split
from cxr_vae.data.index import SplitIndex
from cxr_vae.distributed import world
from cxr_vae.errors import UserError
from cxr_vae.evaluation.bounds import likelihood_figures, unit_facts
from cxr_vae.evaluation.features import FeatureNetwork, Features, choose_network, load_network
from cxr_vae.evaluation.image_sets import (
    ImageSet,
    extract,
    first_images,
    generated_images,
    real_images,
    reconstructions,
    usable_cache,
)
from cxr_vae.evaluation.latent_pictures import save_latent_pictures
from cxr_vae.evaluation.metrics import MAX_PAIRS, Figure, called, check_counts, compare, inception_score, mean_figure
from cxr_vae.files import keep_earlier, read_json, sha256_of, write_json
from cxr_vae.run_dir import RunDir
from cxr_vae.weights import check_trained_classes, load_vae

MAY_OVERRIDE = ("evaluate", *PRIOR_OPTIONS, "device", "data.shards", "data.split_file")


def evaluate(run: RunDir, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluates a finished run and returns the content of its `evaluation_results.json`.

    A run that was evaluated with the same weights and options already is not evaluated again; one whose evaluation was
    broken off goes on. Raises UserError where weights (of the run or the feature network), shards or enough images are
    missing: at the start.
    """
    config = override_config(run.saved_config(), overrides, MAY_OVERRIDE)
    with world(config.device) as here:
        model, _ = load_vae(run.weights, here.device)
        real_index, floor_index = open_splits(config)
        check_classes(config, real_index)
        check_trained_classes(run.weights, real_index)
        num_real = min(config.evaluate.num_real, len(real_index))
        num_floor = min(config.evaluate.num_generated, len(floor_index))
        check_counts(num_real, num_floor, config.evaluate)
        name = here.broadcast(choose_network(config.evaluate.features) if here.is_main else None)
        network = load_network(name, here.device, config.evaluate.features_weights)
        weights_sha256 = sha256_of(run.weights)
        generated = generated_images(run, model, config, here.device)
        request = {
            "run_weights_sha256": weights_sha256,
            "seed": config.seed,
            "evaluate": config.evaluate.model_dump() | network.facts(),
            "index_hashes": [real_index.content_hash, floor_index.content_hash],
        } | ({"generated": generated.facts} if "prior_sha256" in generated.facts else {})
        done = here.broadcast(earlier_results(run, request) if here.is_main else None)
        if done:
            return dict(done)
        if here.is_main and num_real < config.evaluate.num_real:
            print(f"the {real_index.split} split has {num_real} images, not {config.evaluate.num_real}: all are used")

        started = time.perf_counter()
        cache = here.broadcast(usable_cache(run) if here.is_main else None)
        sets = {
            "generated": generated,
            "reconstructions": reconstructions(real_index, num_real, run, model, config, weights_sha256, here.device),
            "real": real_images(real_index, num_real, config, run.evaluation / "real", cache),
            "floor": real_images(floor_index, num_floor, config, None, cache),
        }
        found = {name: extract(images, network, here) for name, images in sets.items()}
        if not here.is_main:
            return {}
        save_latent_pictures(run.evaluation / "pictures", model, *first_images(real_index, num_real, model, config))
        results = results_of(sets, {name: of or {} for name, of in found.items()}, network, config, request)
        results["elapsed_s"] = round(time.perf_counter() - started, 2)
        keep_earlier(run.results)
        write_json(run.results, results)
        shutil.rmtree(run.evaluation / "features", ignore_errors=True)  # for an evaluation that is broken off
    return results


def open_splits(config: Config) -> tuple[SplitIndex, SplitIndex]:
    """The splits of the real images and of the floor; UserError where they are one: that floor would be 0."""
    names = (config.evaluate.real_split, config.evaluate.floor_split)
    if names[0] == names[1]:
        raise UserError(f"evaluate.floor_split and evaluate.real_split are both {names[0]}: name two different splits")
    return open_split(config.data, names[0]), open_split(config.data, names[1])


def results_of(
    sets: Mapping[str, ImageSet],
    found: Mapping[str, Mapping[str, Tensor]],
    network: FeatureNetwork,
    config: Config,
    request: dict[str, Any],
) -> dict[str, Any]:
    """The content of evaluation_results.json: figures with interval, floor and counts, and their circumstances."""
    features = {name: Features(of["pooled"], of.get("logits")) for name, of in found.items()}
    measured = compare(features["generated"], features["real"], config.evaluate)
    floors = compare(features["floor"], features["real"], config.evaluate)
    if "score" in floors:
        floors["score"] = inception_score(features["real"], config.evaluate)
    again = compare(features["reconstructions"], features["real"], config.evaluate)
    of_pixels = {name: mean_figure(found["reconstructions"][name].numpy()) for name in ("psnr_db", "ssim")}
    likelihood = likelihood_figures(found["reconstructions"], config.data.image_size)
    return {
        "figures": {called(name, network.name): record(figure, floors[name]) for name, figure in measured.items()},
        "reconstructions": {
            **sets["reconstructions"].facts,
            "num": sets["reconstructions"].num,
            "figures": {called(name, network.name): record(figure) for name, figure in again.items() if name != "score"}
            | {name: record(figure) for name, figure in of_pixels.items()},
        },
        "likelihood": {name: record(figure) for name, figure in likelihood.items()},
        "latent": unit_facts(found["reconstructions"]) | {"importance_samples": config.evaluate.importance_samples},
        **{f"num_{name}": sets[name].num for name in ("generated", "real", "floor")},
        "num_pairs": {name: min(of.num, MAX_PAIRS) for name, of in sets.items()},
        "num_real_wanted": config.evaluate.num_real,
        **{name: sets[name].facts for name in ("generated", "real")},
        "floor": sets["floor"].facts
        | {"meaning": "real images of this split in place of the generated; for the score, the real images' own"},
        "interval": "value ± 1.96 standard errors, at these numbers of images: of the delete-half jackknife, or of the "
        "mean where the figure is one",
        "is_splits": config.evaluate.is_splits,
        "kid_subset_size": min(config.evaluate.kid_subset_size, sets["generated"].num, sets["real"].num),
        "features": network.facts(),
        "image_size": config.data.image_size,
        "pixel_likelihood": config.objective.likelihood,
        "versions": {name: version(name) for name in ("cxr-vae", "torch", "torch-fidelity", "torchmetrics", "numpy")},
        "request": request,
    }


def record(figure: Figure, floor: Figure | None = None) -> dict[str, Any]:
    """One figure, beside its floor where it has one."""
    of_figure: dict[str, Any] = {
        "value": figure.value,
        "interval_95": list(figure.interval_95),
        "standard_error": figure.standard_error,
    }
    if floor is not None:
        of_figure |= {"floor": floor.value, "floor_interval_95": list(floor.interval_95)}
    return of_figure


def earlier_results(run: RunDir, request: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier evaluation, if it was asked for the same."""
    if not run.results.is_file():
        return None
    results: dict[str, Any] = read_json(run.results, hint="delete it and evaluate again")
    if results.get("request") != request:
        return None
    print(f"{run.results}: already evaluated so", flush=True)
    return results
