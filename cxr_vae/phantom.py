"""Synthetic chest X-ray phantoms, for a demo and for tests: no patient is in them, and nothing medical may be concluded.

A phantom is made as a radiograph is: a map of what the beam meets, in tissue and in bone less the lungs' air, scattered
and turned into film density by the film's curve, with quantum grain on top. Lengths are chest units: x = ±1 is the rib
cage at its widest, y grows downwards from the middle of the lungs. The patient's right is on the image's left.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cxr_vae.errors import UserError

VERSION = 1  # of the drawing: a folder begun by another version cannot be finished by this one
MARKER = ".phantoms.json"
SHORT_SIDE = 360  # pixels at which the anatomy is drawn; the grain comes at the final size
MIN_NUM, MAX_NUM, MAX_SEED = 12, 100_000, 2**32 - 1

Field = NDArray[np.float32]


@dataclass(frozen=True)
class Anatomy:
    """All that is drawn by lot for one picture, in chest units, radians and log attenuation; see `sample`."""

    size: tuple[int, int]  # of the final image: width, height
    rgb: bool  # some of the real files have three equal channels
    view: tuple[float, float, float, float]  # centre x, centre y, half width, tilt
    stature: float  # how tall the chest is for its width
    turn: float  # what a slight turn to the side moves the front against the back
    cage: tuple[float, float]  # y of the lungs' tops, y of the widest place
    fat: float  # between the ribs and the skin
    arms: tuple[float, float]  # angle below the horizontal, right and left
    chin: tuple[float, float]  # x and y of the head's middle
    ribs: tuple[float, float, float, float]  # pitch along the spine, slope, half height, density
    domes: tuple[float, float]  # y of the diaphragm, right and left
    heart: tuple[float, float, float]  # size, angle of its long axis, y
    pedicle: float  # half width of great vessels and thymus
    vessels: float  # how well they show
    stomach: float  # radius of its bubble; 0: none
    pattern: str  # "clear", "lobar" or "haze"
    opacity: float  # share of the air that pus has taken, where it is worst
    film: tuple[float, float, float]  # speed point, contrast, scattered share
    grain: tuple[float, float]  # grey levels, pixels
    borders: tuple[float, float, float, float]  # collimated share: left, top, right, bottom
    marker: tuple[float, float, float] | None  # the "R": x, y, height, as shares of the image
    tube: bool
    cables: int
    electrodes: int

    @classmethod
    def sample(cls, rng: np.random.Generator, *, pneumonia: bool) -> Anatomy:
        """Draw a child of one to five years, the way it lay or stood, and the exposure."""
        uniform, normal, chance = rng.uniform, rng.normal, lambda p: bool(rng.random() < p)
        width = np.clip((1150 if pneumonia else 1650) * math.exp(normal(0, 0.26 if pneumonia else 0.2)), 399, 2890)
        aspect = np.clip((1.48 if pneumonia else 1.3) * math.exp(normal(0, 0.19 if pneumonia else 0.12)), 0.84, 3.2)
        ill = pneumonia * 1.0
        base = uniform(0.36, 0.5) - 0.08 * ill * uniform()  # the ill breathe in less deeply
        raised = uniform(-0.9, 0.2) if chance(0.6) else uniform(0.9, 1.35)
        return cls(
            size=(round(width), round(width / aspect)),
            rgb=pneumonia and chance(0.07),
            view=(normal(0, 0.04), normal(0.0, 0.04), 1.1 * aspect**0.3 * uniform(0.93, 1.1), normal(0, 0.03)),
            stature=uniform(0.95, 1.15),
            turn=normal(0, 0.025),
            cage=(uniform(-0.7, -0.62), uniform(0.3, 0.5)),
            fat=uniform(0.04, 0.14),
            arms=(raised + normal(0, 0.1), raised + normal(0, 0.1)),
            chin=(normal(0, 0.1), uniform(-1.75, -1.4)),
            ribs=(uniform(0.13, 0.155), uniform(0.6, 1.1), uniform(0.024, 0.03), uniform(0.3, 0.48)),
            domes=(base, base + uniform(-0.01, 0.08)),
            heart=(uniform(0.9, 1.12), uniform(0.6, 0.95), base - 0.22),
            pedicle=uniform(0.15, 0.24),
            vessels=uniform(0.7, 1.3) + 0.3 * ill,
            stomach=uniform(0.12, 0.25) if chance(0.4) else 0.0,
            pattern=str(rng.choice(["lobar", "haze"])) if pneumonia else "clear",
            opacity=uniform(0.3, 0.95) if pneumonia else 0.0,
            film=(uniform(1.45, 1.95), uniform(1.3, 1.9), uniform(0.08, 0.25)),
            grain=(uniform(2, 7), uniform(1.2, 2.2)),
            borders=tuple(max(0.0, float(e)) for e in normal(-0.02, 0.03, 4)),  # type: ignore[arg-type]
            marker=(uniform(0.02, 0.09), uniform(0.03, 0.6), uniform(0.035, 0.06)) if chance(0.85) else None,
            tube=chance(0.03 + 0.12 * ill),
            cables=int(rng.integers(1, 3)) if chance(0.04 + 0.16 * ill) else 0,
            electrodes=int(rng.integers(1, 4)) if chance(0.02 + 0.15 * ill) else 0,
        )


class _View(NamedTuple):
    """The pixels of the working image, in chest units, and one pixel's side."""

    x: Field
    y: Field
    pixel: float


def _view(a: Anatomy) -> _View:
    """Lay the pixel grid over the patient."""
    scale = SHORT_SIDE / min(a.size)
    w, h = (round(side * scale) for side in a.size)
    centre_x, centre_y, half, tilt = a.view
    pixel = 2 * half / w
    x, y = np.meshgrid((np.arange(w) - (w - 1) / 2) * pixel, (np.arange(h) - (h - 1) / 2) * pixel)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return _View(
        (x * cos - y * sin + centre_x).astype(np.float32),
        ((x * sin + y * cos) / a.stature + centre_y).astype(np.float32),
        pixel,
    )


# ---------------------------------------------------------------------------------------------------------- shapes
def _rise(t: Field, width: float) -> Field:
    """0 below, 1 above zero, smooth over `width`."""
    t = np.clip(t * (1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def _chord(q: Field) -> Field:
    """How much of a round body the beam crosses: 1 in its middle (q = 0), 0 from its outline (q = 1) on."""
    return np.sqrt(np.clip(1 - q, 0, 1))


def _ellipse(v: _View, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Field:
    """The squared radius in an ellipse's own measure: below 1 inside."""
    cos, sin = math.cos(angle), math.sin(angle)
    dx, dy = v.x - x, v.y - y
    return ((dx * cos + dy * sin) / rx) ** 2 + ((dy * cos - dx * sin) / ry) ** 2


def _capsule(v: _View, start: tuple[float, float], end: tuple[float, float]) -> tuple[Field, Field]:
    """The distance to a straight piece, and how far along it (0 to 1)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((v.x - start[0]) * dx + (v.y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(v.x - start[0] - along * dx, v.y - start[1] - along * dy), along


def _bone(distance: Field, half: Field | float) -> Field:
    """A bone across: a soft inside between two bright edges, the cortex, which the beam meets edge on."""
    inside = _rise(half - distance, 0.016)
    return inside * (0.55 + 0.6 * np.exp(-(((distance - half + 0.009) / 0.008) ** 2)))


def _texture(rng: np.random.Generator, v: _View, cell: float) -> Field:
    """Smooth noise, normal (0, 1) or so, with grains of `cell` chest units."""
    h, w = v.x.shape
    shape = (max(2, round(h * v.pixel / cell)) + 2, max(2, round(w * v.pixel / cell)) + 2)
    noise = Image.fromarray(rng.standard_normal(shape, dtype=np.float32))
    return np.asarray(noise.resize((w, h), Image.Resampling.BICUBIC)) * np.float32(1.3)


# ------------------------------------------------------------------------------------------------------- soft parts
def _cage(a: Anatomy, y: Field) -> Field:
    """The half width of the rib cage: a bell that closes at the lungs' tops and narrows a little to the waist."""
    top, widest = a.cage
    above = np.clip((widest - y) / (widest - top), 0, 1)
    return np.sqrt(1 - above * above) - 0.1 * np.clip(y - widest, 0, 1) ** 2


def _body(v: _View, a: Anatomy) -> Field:
    """The thickness of trunk, neck, head and arms; 0 in the air around."""
    side = 1.03 + a.fat + 0.05 * np.clip(v.y, 0, 1)
    trunk = _chord((v.x / side) ** 2 + (np.clip(v.y + 0.3, -9, 0) / 0.48) ** 2)
    neck = 0.75 * _chord((v.x / 0.36) ** 2) * _rise(-0.35 - v.y, 0.4)
    head = 1.1 * _chord(_ellipse(v, *a.chin, 0.5, 0.6))
    parts = [trunk, neck, head]
    for sign, angle in zip((-1, 1), a.arms, strict=True):
        distance, along = _capsule(v, *_humerus(sign, angle, 1.5))
        parts.append(0.55 * _chord((distance / (0.27 - 0.09 * along)) ** 2))
    return sum(part**3 for part in parts) ** np.float32(1 / 3)  # type: ignore[no-any-return]


def _humerus(sign: int, angle: float, length: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Shoulder joint and elbow of one arm."""
    joint = (sign * 0.97, -0.52)
    return joint, (joint[0] + sign * length * math.cos(angle), joint[1] + length * math.sin(angle))


def _heart(v: _View, a: Anatomy) -> Field:
    """1 where heart and great vessels hide the lungs: an oblique egg, the right atrium, aorta, thymus."""
    size, angle, y = a.heart
    soft = 0.1
    egg = _rise(1 - _ellipse(v, 0.13 + a.turn, y, 0.46 * size, 0.31 * size, angle), soft)
    atrium = _rise(1 - _ellipse(v, -0.12 + a.turn, y + 0.03, 0.2 * size, 0.27 * size), soft)
    knob = _rise(1 - _ellipse(v, 0.1 + a.turn, -0.3, a.pedicle - 0.02, 0.3, -0.15), soft)
    cava = _rise(a.pedicle - np.abs(v.x - a.turn), 0.05)
    return np.maximum(np.maximum(egg, atrium), np.maximum(knob, cava))


def _diaphragm(v: _View, a: Anatomy) -> Field:
    """y of the two domes, falling to the costophrenic angles at the sides."""
    top = np.where(v.x < 0, a.domes[0], a.domes[1]).astype(np.float32)
    out = np.abs(v.x) - 0.45
    return top + np.where(out > 0, 0.28 * np.clip(out / 0.5, 0, 2) ** 2.4, 0.25 * out * out)


def _lungs(v: _View, a: Anatomy) -> tuple[Field, Field]:
    """The depth of lung behind each pixel (0 to 1) before and after heart and diaphragm cover it."""
    q = (v.x / np.maximum(_cage(a, v.y) - 0.025, 1e-3)) ** 2
    depth = np.sqrt(_chord(q)) * _rise(v.y - a.cage[0], 0.15)
    seen = depth * (1 - 0.93 * _heart(v, a)) * (1 - 0.9 * _rise(v.y - _diaphragm(v, a), 0.035))
    return depth, seen


def _vessels(rng: np.random.Generator, v: _View, a: Anatomy) -> Field:
    """Arteries and veins: from either hilum they fork, thin out and wriggle."""
    from scipy.ndimage import gaussian_filter

    h, w = v.x.shape
    cx, cy, half, tilt = a.view
    total = np.zeros((h, w), np.float32)
    for sign in (-1, 1):
        x, y = np.full(16, sign * 0.24 + a.turn), rng.normal(-0.02, 0.07, 16)
        heading = np.linspace(-1.4, 1.4, 16) + rng.normal(0, 0.15, 16)
        for generation, width in enumerate((0.016, 0.011, 0.007, 0.005)):
            heading = heading + np.cumsum(rng.normal(0, 0.06, (24, x.size)), axis=0)
            x = x + sign * 0.006 * np.cumsum(np.cos(heading), axis=0)
            y = y + 0.006 * np.cumsum(np.sin(heading), axis=0)
            dx, dy = (x - cx), (y - cy) * a.stature
            col = np.rint((dx * math.cos(tilt) + dy * math.sin(tilt)) / v.pixel + (w - 1) / 2).astype(int)
            row = np.rint((dy * math.cos(tilt) - dx * math.sin(tilt)) / v.pixel + (h - 1) / 2).astype(int)
            ok = (col >= 0) & (col < w) & (row >= 0) & (row < h)
            hits = np.bincount(row[ok] * w + col[ok], minlength=h * w).reshape(h, w).astype(np.float32)
            total += gaussian_filter(hits, width / v.pixel) * np.float32(width / v.pixel**2 * 0.012)
            x, y, heading = (np.concatenate([part[-1], part[rng.integers(8, 24)]]) for part in (x, y, heading))
            heading = heading + np.repeat(rng.uniform(0.15, 0.5, 2) * (1, -1), heading.size // 2)
    return a.vessels * np.minimum(total, 0.6)


def _opacities(rng: np.random.Generator, v: _View, a: Anatomy) -> Field:
    """The share of the air that is lost to pneumonia: a lobe with a fuzzy edge, or patches on both sides."""
    if a.pattern == "clear":
        return np.zeros_like(v.x)
    cloud = 0.6 * _texture(rng, v, 0.3) + 0.4 * _texture(rng, v, 0.1) + 0.25 * _texture(rng, v, 0.04)
    if a.pattern == "lobar":
        sign = -1 if rng.random() < 0.6 else 1
        lobe = _ellipse(
            v, sign * rng.uniform(0.3, 0.65), rng.uniform(-0.35, 0.4), rng.uniform(0.2, 0.45), rng.uniform(0.15, 0.4)
        )
        return a.opacity * _rise(1 - np.sqrt(lobe) + 0.25 * cloud, 0.9)
    perihilar = np.exp(-_ellipse(v, 0, rng.uniform(0, 0.2), rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.6)))
    return 0.85 * a.opacity * np.clip(perihilar * (0.6 + 0.5 * cloud), 0, 1)


# ------------------------------------------------------------------------------------------------------------ bones
def _ribs(v: _View, a: Anatomy) -> Field:
    """Eleven pairs. A rib is a tilted ring, which projects to an ellipse: its upper arc is the back, its lower arc the
    front, which ends in cartilage before the middle; at the sides the beam runs along the bone, and it is brightest.
    """
    pitch, slope, half, density = a.ribs
    total = np.zeros_like(v.x)
    for i in range(11):
        drop = slope * (0.1 + 0.032 * i)
        middle = a.cage[0] + 0.06 + pitch * i + drop
        reach = float(_cage(a, np.float32(middle))) - 0.01  # type: ignore[arg-type]
        x, y = v.x / reach, (v.y - middle) / drop
        radius = np.sqrt(x * x + y * y) + 1e-3
        distance = np.abs(radius - 1) * radius / np.hypot(x / reach, y / drop)
        front = _rise(v.y - middle, 0.02)
        lateral = np.clip(np.abs(x), 0, 1) ** 4
        thick = half * (1 - 0.3 * lateral) * (1 + 0.2 * front)
        shown = (1 - front) * _rise(np.abs(v.x) - 0.08, 0.05) + front * 0.6 * _rise(np.abs(x) - 0.55, 0.1)
        total += density * (0.75 + 0.8 * lateral) * shown * _bone(distance, thick)
    return total


def _spine(v: _View, a: Anatomy) -> Field:
    """Vertebral bodies with bright end plates, darker discs between them, pedicles and spinous processes."""
    pitch = a.ribs[0]
    x = v.x + a.turn / 2
    half = 0.115 + 0.025 * np.clip(v.y, -1, 1)
    phase = np.abs((v.y - a.cage[0]) / pitch % 1 - 0.5) * 2  # 0 in a vertebra's middle, 1 in the disc's
    waist = half * (1 - 0.08 * (1 - phase))
    column = _rise(waist - np.abs(x), 0.02)
    plates = np.exp(-(((phase - 0.75) / 0.07) ** 2))
    sides = np.exp(-(((np.abs(x) - waist + 0.012) / 0.012) ** 2))
    pedicles = _rise(1 - ((np.abs(x) - 0.6 * half) / 0.025) ** 2 - (phase / 0.35) ** 2, 1)
    process = _rise(1 - (x / 0.02) ** 2 - ((phase - 0.9) / 0.4) ** 2, 1)
    body = 0.3 - 0.2 * _rise(phase - 0.8, 0.12)
    return column * (body + 0.12 * plates + 0.1 * sides * (phase < 0.8) + 0.12 * pedicles + 0.1 * process)


def _shoulders(v: _View, a: Anatomy) -> Field:
    """Clavicles, shoulder blades and the upper arms' bones."""
    total = np.zeros_like(v.x)
    for sign, angle in zip((-1, 1), a.arms, strict=True):
        m = sign * (v.x - a.turn)
        lift = 0.05 + 0.3 * (1 - math.sin(max(angle, 0)))  # raised arms carry the outer ends up
        curve = a.cage[0] + 0.13 - lift * (m - 0.1) - 0.04 * np.sin(7 * (m - 0.1))
        ends = _rise(m - 0.11, 0.04) * _rise(0.84 - m, 0.06)
        total += 0.5 * ends * _bone(np.abs(v.y - curve) * 0.92, 0.035 + 0.012 * np.abs(m - 0.45))
        joint, elbow = _humerus(sign, angle, 1.3)
        distance, along = _capsule(v, joint, elbow)
        total += 0.5 * _bone(distance, 0.055 + 0.06 * np.exp(-along * 14))
        blade = np.maximum(
            np.maximum(-(m - 0.66 - 0.1 * (v.y + 0.5)), -(v.y + 0.5) - 0.25 * (m - 0.7)),
            m - 0.98 + 0.4 * (v.y + 0.4),
        )
        total += 0.1 * _rise(-blade, 0.03) + 0.14 * np.exp(-((blade / 0.012) ** 2)) * _rise(0.15 - v.y, 0.1)
        total += 0.2 * _chord(_ellipse(v, sign * 0.86, -0.5, 0.06, 0.1, sign * 0.5))
    return total


def _airways(v: _View, a: Anatomy) -> Field:
    """The trachea's strip of air down to its fork, and the two main bronchi."""
    x = a.turn + 0.012
    fork = a.cage[0] + 0.42
    trachea = _chord(((v.x + x) / 0.042) ** 2) * _rise(fork - v.y, 0.05)
    for sign, drop in ((-1, 0.16), (1, 0.12)):
        distance, _ = _capsule(v, (-x, fork - 0.02), (sign * 0.2 - x, fork + drop))
        trachea = np.maximum(trachea, 0.7 * _chord((distance / 0.03) ** 2))
    return trachea


def _devices(rng: np.random.Generator, v: _View, a: Anatomy) -> Field:
    """A stomach tube, cables and electrodes, all of which lie on or in the patient by chance."""
    total = np.zeros_like(v.x)
    if a.tube:
        total += 0.3 * _bone(np.abs(v.x - 0.02 - 0.03 * np.sin(3 * v.y + 1)), 0.016) * _rise(0.5 - v.y, 0.02)
    for _ in range(a.cables):
        slope, bend, at, wave = rng.normal(0, 0.7), rng.normal(0, 0.4), rng.uniform(-0.6, 0.7), rng.uniform(2, 4)
        curve = at + slope * v.x + bend * np.sin(wave * v.x)
        total += 0.45 * np.exp(-(((v.y - curve) / math.hypot(1, slope) / 0.012) ** 2))
    for _ in range(a.electrodes):
        disc = _ellipse(v, rng.uniform(-0.9, 0.9), rng.uniform(-0.6, 0.7), 0.045, 0.045)
        total += 0.5 * _rise(1 - disc, 0.3) + 0.6 * _rise(0.2 - disc, 0.2)
    return total


# ---------------------------------------------------------------------------------------------------------- picture
def _attenuation(rng: np.random.Generator, v: _View, a: Anatomy) -> Field:
    """What the beam loses on its way to each pixel, as a natural logarithm: about 0 in air, 3 in the abdomen."""
    body = _body(v, a)
    depth, seen = _lungs(v, a)
    total = body * (2.5 + 0.35 * _rise(v.y - _diaphragm(v, a), 0.25) + 0.05 * _texture(rng, v, 0.15))
    total -= 1.45 * seen * (1 - _opacities(rng, v, a)) * (1 + 0.04 * _texture(rng, v, 0.03))
    total += _vessels(rng, v, a) * (0.3 * depth + 0.7 * seen)
    total -= 0.4 * _airways(v, a)
    if a.stomach:
        bubble = _ellipse(v, 0.5, a.domes[1] + 0.1 + a.stomach, a.stomach * 1.3, a.stomach, 0.3)
        total -= 0.8 * np.sqrt(_chord(bubble))
    solid = _rise(body - 0.05, 0.2)  # no bone without flesh around it
    return total + solid * (_ribs(v, a) + _spine(v, a) + _shoulders(v, a)) + _devices(rng, v, a)


def _expose(attenuation: Field, v: _View, a: Anatomy) -> Field:
    """The film's answer, 0 black to 1 white: primary beam and scatter through a logistic density curve."""
    from scipy.ndimage import gaussian_filter, uniform_filter

    speed, contrast, scattered = a.film
    beam = np.exp(-gaussian_filter(attenuation, 0.6))
    size = max(3, round(0.25 / v.pixel))
    beam = (1 - scattered) * beam + scattered * uniform_filter(uniform_filter(np.minimum(beam, 0.4), size), size)
    return 1 / (1 + (beam * np.float32(math.exp(speed))) ** np.float32(contrast))


def _collimate(grey: Field, a: Anatomy) -> None:
    """Blacken the borders the collimator kept the beam from."""
    h, w = grey.shape
    left, top, right, bottom = a.borders
    grey[: round(top * h)] = grey[h - round(bottom * h) :] = 0.02
    grey[:, : round(left * w)] = grey[:, w - round(right * w) :] = 0.02


def _grain(rng: np.random.Generator, grey: Field, a: Anatomy) -> Field:
    """Quantum noise as the film's curve passes it on: least in black, most where few quanta came through."""
    level, size = a.grain
    h, w = grey.shape
    coarse = rng.standard_normal((max(1, round(h / size)), max(1, round(w / size))), dtype=np.float32)
    noise = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))
    return grey * 255 + level * 4 * grey * np.sqrt(grey * (1 - grey)) * noise


def draw_phantom(rng: np.random.Generator, *, pneumonia: bool) -> Image.Image:
    """Draw one phantom: mode "L" (or, 7 % of those with pneumonia, "RGB" with equal channels), 399 to 2890 px wide."""
    a = Anatomy.sample(rng, pneumonia=pneumonia)
    v = _view(a)
    work = Image.fromarray(_expose(_attenuation(rng, v, a), v, a))
    grey = np.clip(np.asarray(work.resize(a.size, Image.Resampling.BICUBIC)), 0, 1)
    _collimate(grey, a)
    image = Image.fromarray(np.clip(_grain(rng, grey, a), 0, 255).astype(np.uint8))
    if a.marker:
        x, y, height = a.marker
        font = ImageFont.load_default(max(8, height * a.size[1] * 1.4))
        ImageDraw.Draw(image).text((x * a.size[0], y * a.size[1]), "R", fill=245, font=font)
    return image.convert("RGB") if a.rgb else image
