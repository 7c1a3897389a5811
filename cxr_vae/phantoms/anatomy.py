"""What differs from one phantom to the next: the child, how it lies, the exposure; in the chest units of `drawing`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cxr_vae.phantoms.shapes import Point


@dataclass(frozen=True)
class Anatomy:
    """All that differs from one picture to the next, in chest units, radians and natural logarithms of the beam."""

    size: tuple[int, int]  # of the final image: width, height
    rgb: bool  # some of the real files have three equal channels
    view: tuple[float, float, float, float]  # centre x and y, half width, tilt
    stature: float  # how tall the chest is for its width
    turn: float  # how far a turn to the side moves the front against the back
    cage: Point  # y of the lungs' tops and of the widest place
    fat: float  # between the ribs and the skin
    arms: Point  # angle below the horizontal, right and left
    chin: Point  # x and y of the head's middle, mostly above the image
    ribs: tuple[float, float, float, float, float]  # pitch, slope, half height, density, bulge out of the cage
    domes: Point  # y of the diaphragm, right and left
    heart: Point  # size, and y where it is widest
    pedicle: float  # half width of the great vessels and the thymus
    vessels: float  # how well the lungs' vessels show
    stomach: float  # radius of its gas; 0: none
    opacity: float  # share of the air lost to pneumonia where it is worst; 0: healthy
    lobar: bool  # pneumonia of one lobe, not in patches on both sides
    devices: tuple[int, ...]  # tubes, cables, electrodes
    film: tuple[float, float, float]  # the loss that gives mid grey, contrast, scattered share
    grain: Point  # strength in grey levels, size in pixels
    borders: list[float]  # blackened by the collimator, as shares: left, top, right, bottom
    marker: tuple[float, float, float] | None  # the letter R: x, y, height, as shares

    @classmethod
    def sample(cls, rng: np.random.Generator, *, pneumonia: bool) -> Anatomy:
        """Draw a child of one to five years, how it was placed, and the exposure."""
        uniform, normal, ill = rng.uniform, rng.normal, float(pneumonia)
        width = (1150 if pneumonia else 1650) * math.exp(normal(0, 0.26 if pneumonia else 0.2))
        aspect = (1.48 if pneumonia else 1.3) * math.exp(normal(0, 0.19 if pneumonia else 0.12))
        width, aspect = min(max(width, 399.0), 2890.0), min(max(aspect, 0.84), 3.2)
        dome = uniform(0.36, 0.5) - 0.08 * ill * uniform()  # the ill breathe in less deeply
        arms = uniform(-0.9, 0.2) if uniform() < 0.6 else uniform(0.9, 1.35)  # raised, or at the sides
        return cls(
            size=(round(width), round(width / aspect)),
            rgb=uniform() < 0.07 * ill,
            # a wider image shows more of the arms, and also cuts off more above and below
            view=(normal(0, 0.04), normal(0, 0.07), 1.1 * aspect**0.3 * uniform(0.93, 1.1), normal(0, 0.03)),
            stature=uniform(1.0, 1.25),
            turn=normal(0, 0.025),
            cage=(uniform(-0.7, -0.62), uniform(0.35, 0.6)),
            fat=uniform(0.06, 0.18),
            arms=(arms + normal(0, 0.1), arms + normal(0, 0.1)),
            chin=(normal(0, 0.1), uniform(-1.7, -1.3)),
            ribs=(uniform(0.13, 0.155), uniform(0.8, 1.4), uniform(0.027, 0.034), uniform(0.33, 0.5), uniform(0, 0.7)),
            domes=(dome, dome + uniform(-0.01, 0.08)),
            heart=(uniform(0.88, 1.12), dome - uniform(0.12, 0.2)),
            pedicle=uniform(0.14, 0.24),
            vessels=uniform(0.5, 1.0) + 0.2 * ill,
            stomach=uniform(0.12, 0.25) if uniform() < 0.4 else 0.0,
            opacity=ill * uniform(0.35, 1.0),
            lobar=uniform() < 0.5,
            devices=tuple(int(n * (uniform() < 0.03 + 0.1 * ill)) for n in rng.integers(1, (2, 3, 4))),
            film=(uniform(1.8, 2.3), uniform(1.45, 2.0) - 0.4 * ill * uniform(), uniform(0.08, 0.25)),
            grain=(uniform(1.0, 4.0), uniform(1.2, 2.2)),
            borders=[max(0.0, float(share)) for share in normal(-0.02, 0.03, 4)],
            marker=(uniform(0.02, 0.09), uniform(0.03, 0.6), uniform(0.035, 0.06)) if uniform() < 0.85 else None,
        )
