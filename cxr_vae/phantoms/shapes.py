"""Shapes that phantoms are drawn with: fields over the picture, in the chest units of `drawing`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.floating[Any]]  # float32 throughout
Point = tuple[float, float]


class View(NamedTuple):
    """Where the pixels of the working image lie, and a pixel's side, all in chest units."""

    x: Field
    y: Field
    pixel: float


def rise(t: Field, width: float) -> Field:
    """0 below zero, 1 above it, smooth over `width`."""
    t = np.clip(t * (1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def line(t: Field, width: float) -> Field:
    """A soft line where `t` is zero."""
    t = t * (1 / width)
    return np.exp(-t * t)


def chord(q: Field) -> Field:
    """How much of a round body the beam crosses: 1 in its middle (q = 0), 0 from its outline (q = 1) on."""
    return np.sqrt(np.maximum(1 - q, 0))


def ellipse(v: View, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Field:
    """The squared distance from an ellipse's middle, 1 on its outline."""
    cos, sin = math.cos(angle), math.sin(angle)
    dx, dy = v.x - x, v.y - y
    return ((dx * cos + dy * sin) / rx) ** 2 + ((dy * cos - dx * sin) / ry) ** 2


def stick(v: View, start: Point, end: Point) -> tuple[Field, Field]:
    """The distance from a straight piece, and how far along it the nearest point lies (0 to 1)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((v.x - start[0]) * dx + (v.y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.sqrt((v.x - start[0] - along * dx) ** 2 + (v.y - start[1] - along * dy) ** 2), along


def bone(distance: Field, half: Field | float) -> Field:
    """A bone across: a soft inside between two bright edges, the cortex, which the beam meets edge on."""
    return rise(half - distance, 0.016) * (0.65 + 0.45 * line(distance - half + 0.008, 0.008))


def outline(y: Field, knots: list[Point]) -> Field:
    """x of a rounded border through (y, x) knots."""
    grid, round_off = np.linspace(-2, 2, 401), np.hanning(33)
    border = np.convolve(np.interp(grid, *np.array(knots).T), round_off / round_off.sum(), "same")
    return np.interp(y, grid, border).astype(np.float32)


def enlarge(field: Field, size: tuple[int, int]) -> Field:
    """The field at another size (width, height), smoothly interpolated."""
    larger: Field = np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BICUBIC))
    return larger


def texture(rng: np.random.Generator, v: View, cell: float) -> Field:
    """Smooth noise of about normal (0, 1), with lumps of `cell` chest units."""
    h, w = v.x.shape
    coarse = rng.standard_normal([math.ceil(side * v.pixel / cell) + 2 for side in (h, w)], dtype=np.float32)
    return 1.3 * enlarge(coarse, (w, h))
