"""Sweeps: one run for each combination of values, and their table."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cxr_vae.config_file import load_values
from cxr_vae.errors import UserError

MAX_RUNS = 1000


def grid_of(words: Sequence[str], file: Path | None) -> dict[str, list[str]]:
    """`key=a,b,c` and a YAML file of lists by key, as values in text; a comma within brackets doesn't part."""
    grid: dict[str, list[str]] = {}
    if file is not None:
        grid |= load_values(file)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or not text:
            raise UserError(f"{word!r}: write key=a,b,c, as in lr=1e-3,1e-4")
        grid[key] = re.split(r",(?![^\[]*\])", text)
    num_runs = 1
    for values in grid.values():
        num_runs *= len(values)
    if not grid or num_runs < 2:
        raise UserError("a sweep needs several values of a key, as in lr=1e-3,1e-4; for one run use train")
    if num_runs > MAX_RUNS:
        raise UserError(f"this is a sweep of {num_runs} runs, more than {MAX_RUNS}: name fewer values")
    return grid


def combinations(grid: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Overrides of each run; keys with one value are in all of them."""
    choices = [[f"{key}={value}" for value in values] for key, values in grid.items()]
    return [list(choice) for choice in itertools.product(*choices)]


def name_of(overrides: Sequence[str], grid: Mapping[str, Sequence[str]]) -> str:
    """A directory's name for one run: what differs from the others."""
    varying = [word for word in overrides if len(grid[word.partition("=")[0]]) > 1]
    return re.sub(r"[^\w=.,+-]+", "_", ",".join(varying)).strip("_")
