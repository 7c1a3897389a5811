"""Which figures may stand in one table: those of the same measure, and why others may not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cxr_vae.report.inputs import FigureRecord, Inputs, Results

Group = tuple[list[Inputs], dict[str, str]]
"""Runs that may stand in one table, and the circumstances they share."""


def words(facts: Mapping[str, Any]) -> dict[str, str]:
    """Circumstances as texts, without those that are not known."""
    return {name: str(value) for name, value in facts.items() if value is not None}


def circumstances(results: Results) -> dict[str, str]:
    """All that has to be equal for two figures of samples to be compared."""
    evaluate = results.request.get("evaluate", {})
    return words(
        {
            "feature network": results.features.get("network"),
            "its weights, SHA-256": results.features.get("weights_sha256"),
            "its code, SHA-256": results.features.get("code_sha256"),
            "dtype": results.features.get("dtype"),
            "resize": results.features.get("resize"),
            "image size": results.image_size,
            "generated images": results.num_generated,
            "real images": results.num_real,
            "real split": results.real.get("split"),
            "its index, SHA-256": results.real.get("index_sha256"),
            "which of its images, SHA-256": results.real.get("rows_sha256"),
            "floor images": results.num_floor,
            "floor split": results.floor.get("split"),
            "its index, SHA-256 (floor)": results.floor.get("index_sha256"),
            "parts of the score": evaluate.get("is_splits"),
            "images of a kernel distance's subset": evaluate.get("kid_subset_size"),
        }
    )


def of_samples(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Figures of generated images."""
    return results.figures, circumstances(results)


def of_reconstructions(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Figures of reconstructed real images; generated ones and the floor have no part in them."""
    if results.reconstructions is None:
        return {}, {}
    facts = circumstances(results) | words({"reconstructed images": results.reconstructions.num})
    others = ("generated", "floor", "(floor)", "parts", "real images")
    return results.reconstructions.figures, {
        name: fact for name, fact in facts.items() if not name.startswith(others) and not name.endswith("(floor)")
    }


def of_likelihood(results: Results) -> tuple[Mapping[str, FigureRecord], dict[str, str]]:
    """Bounds on the likelihood of real images; no feature network has a part in them."""
    facts = circumstances(results)
    kept = ("image size", "real images", "real split", "its index, SHA-256", "which of its images, SHA-256")
    own = {
        "pixel likelihood": results.pixel_likelihood,
        "latents of the importance-weighted bound": results.latent.get("importance_samples"),
    }
    return results.likelihood or {}, {name: facts[name] for name in kept if name in facts} | words(own)


Kind = Callable[[Results], tuple[Mapping[str, FigureRecord], dict[str, str]]]

KINDS: dict[str, Kind] = {
    "Samples": of_samples,
    "Reconstructions of real images": of_reconstructions,
    "Likelihood": of_likelihood,
}


def losses_circumstances(run: Inputs) -> dict[str, str]:
    """All that has to be equal for two test losses to be compared."""
    split = str(run.config.get("data.test_split", "test"))
    return words(
        {
            "image size": run.config.get("data.image_size"),
            "test split": split,
            "its index, SHA-256": run.index_hashes.get(split),
            "pixel likelihood": run.config.get("objective.likelihood"),
            "KL weight": run.config.get("objective.kl_weight"),
        }
    )


def grouped(runs: Sequence[Inputs], facts_of: Callable[[Inputs], dict[str, str]]) -> list[Group]:
    """Runs by their circumstances, in the order in which these first appear."""
    groups: list[Group] = []
    for run in runs:
        facts = facts_of(run)
        for members, shared in groups:
            if shared == facts:
                members.append(run)
                break
        else:
            groups.append(([run], facts))
    return groups


def why_apart(facts: Mapping[str, str], first: Mapping[str, str]) -> str:
    """What keeps a group from being compared with the first: `feature network random, not inception`."""
    names = [name for name in {**first, **facts} if facts.get(name) != first.get(name)]
    return "; ".join(f"{name} {short(facts.get(name))}, not {short(first.get(name))}" for name in names)


def short(fact: str | None) -> str:
    """A fact in a sentence: the first digits of a hash, `unknown` for None."""
    if fact is None:
        return "unknown"
    return f"{fact[:12]}…" if len(fact) == 64 and fact.isalnum() else fact
