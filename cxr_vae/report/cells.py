"""How figures are written: their titles, their digits, and the tables they stand in."""

import math
from dataclasses import dataclass, field

LOWER, HIGHER = "lower is better", "higher is better"

KNOWN = {
    "fid": ("FID", LOWER),
    "fid_infinity": ("FID∞", LOWER),
    "kid": ("KID", LOWER),
    "inception_score": ("Inception Score", ""),
    "frechet": ("Fréchet distance", LOWER),
    "frechet_infinity": ("Fréchet distance, extrapolated", LOWER),
    "kernel": ("Kernel distance", LOWER),
    "score": ("Score of classes", ""),
    "precision": ("Precision", HIGHER),
    "recall": ("Recall", HIGHER),
    "density": ("Density", HIGHER),
    "coverage": ("Coverage", HIGHER),
    "psnr_db": ("PSNR, dB", HIGHER),
    "ssim": ("SSIM", HIGHER),
    "negative_elbo_nats": ("Negative ELBO, nats an image", LOWER),
    "reconstruction_nats": ("Reconstruction, nats an image", LOWER),
    "kl_nats": ("KL, nats an image", ""),
    "importance_bound_nats": ("Importance-weighted bound, nats an image", LOWER),
    "bits_per_dim": ("Bits per dimension", LOWER),
    "active_units": ("Active latent units", ""),
}
"""Titles, and which way is better where one is."""


@dataclass(frozen=True)
class Cell:
    """What stands in a table: text, and smaller text below it."""

    text: str
    note: str = ""
    is_number: bool = True
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table on a page; the first cell of a row is its heading."""

    title: str
    headers: list[str]
    rows: list[list[Cell]]
    note: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """Its circumstances, by name."""


def describe(name: str) -> tuple[str, str]:
    """A figure's title and which way is better; `frechet_random` is `Fréchet distance, random features`."""
    known = max((one for one in KNOWN if name == one or name.startswith(f"{one}_")), key=len, default=None)
    if known is None:
        return name.replace("_", " "), ""
    title, better = KNOWN[known]
    rest = name[len(known) + 1 :]
    return f"{title}{f', {rest} features' if rest else ''}", better


def number(value: float | int | bool | str | None) -> Cell:
    """A number as text, a text as it is, nothing as a dash."""
    if value is None:
        return Cell("–", is_number=False)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", is_number=False)
    if isinstance(value, str):
        return Cell(value, is_number=False)
    return Cell(f"{value:,}".replace(",", " ") if isinstance(value, int) else brief(value))


def brief(value: float, low_high: tuple[float, float] | None = None) -> str:
    """A number with the digits that count: two of its interval's half, four where there is none."""
    half = 0.0 if low_high is None else (low_high[1] - low_high[0]) / 2
    if not math.isfinite(value) or not math.isfinite(half):
        return str(value)
    if half <= 0:
        text = f"{value:.4g}"
        text = f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text
    elif max(abs(value), half) < 1e-3:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        text = f"{value:.{max(0, 1 - math.floor(math.log10(half)))}f}"
    return text.replace("-", "−")


def interval(low_high: tuple[float, float] | None) -> str:
    """`3.1 … 3.5`; empty where there is none."""
    return "" if low_high is None else f"{brief(low_high[0], low_high)} … {brief(low_high[1], low_high)}"


def measured(value: float | None, low_high: tuple[float, float] | None) -> Cell:
    """A figure, rounded as its interval asks for."""
    return number(None) if value is None else Cell(brief(value, low_high))
