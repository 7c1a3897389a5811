"""Synthetic chest X-ray phantoms, for a demo and for tests: they show no patient and prove nothing about medicine.

A phantom is made as a radiograph is: a map of what the beam loses in tissue and bone, less the lungs' air, then scatter
and the film's curve, then quantum grain. Lengths are chest units: x = -1 to 1 is the rib cage at its widest, and y runs
down, about -0.7 to 0.6 from the lungs' tops to their lowest corners. The patient's right is on the image's left.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxr_vae.phantoms.anatomy import Anatomy
from cxr_vae.phantoms.shapes import (
    Field,
    Point,
    View,
    bone,
    chord,
    ellipse,
    enlarge,
    line,
    outline,
    rise,
    stick,
    texture,
)

VERSION = 1
"""Of the drawing: what one version began, another can't finish. Raise it whenever a phantom changes."""

SHORT_SIDE = 380  # pixels of the working image; only the grain and the marker are drawn at the final size


def _view(a: Anatomy) -> View:
    """Lay the pixels over the patient."""
    w, h = (round(side * SHORT_SIDE / min(a.size)) for side in a.size)
    centre_x, centre_y, half, tilt = a.view
    pixel = 2 * half / w
    x, y = np.meshgrid((np.arange(w) - (w - 1) / 2) * pixel, (np.arange(h) - (h - 1) / 2) * pixel)
    cos, sin = math.cos(tilt), math.sin(tilt)
    across, down = x * cos - y * sin + centre_x, (x * sin + y * cos) / a.stature + centre_y
    return View(across.astype(np.float32), down.astype(np.float32), pixel)


def _arm(sign: int, angle: float, length: float) -> tuple[Point, Point]:
    """The ends of an upper arm: shoulder and, `length` away, elbow."""
    return (sign * 0.97, -0.52), (sign * (0.97 + length * math.cos(angle)), -0.52 + length * math.sin(angle))


def _body(v: View, a: Anatomy) -> Field:
    """The thickness of trunk, shoulders, neck, head and arms; 0 in the air around."""
    side = 1.03 + a.fat + 0.05 * np.clip(v.y, 0, 1) + 0.15 * rise(-0.15 - v.y, 0.7)  # wider to the waist and armpit
    slope = -1.0 + 0.3 * np.abs(v.x)  # from the neck's side to the shoulder's tip
    parts = [
        chord(((v.x / side) ** 2) ** 2 + (np.minimum(v.y + 0.2, 0) / 0.6) ** 2),
        0.75 * np.sqrt(rise(v.y - slope, 0.5) * chord(((v.x / 1.1) ** 2) ** 2) * rise(-0.1 - v.y, 0.6)),
        0.7 * chord((v.x / 0.36) ** 2) * rise(-0.45 - v.y, 0.6),
        1.1 * chord(ellipse(v, *a.chin, 0.5, 0.6)),
    ]
    for sign, angle in zip((-1, 1), a.arms, strict=True):
        distance, along = stick(v, *_arm(sign, angle, 1.5))
        parts.append(0.55 * chord((distance / (0.25 - 0.08 * along)) ** 2))
    total = np.zeros_like(v.x)
    for part in parts:
        total += (part * part) ** 2
    return np.sqrt(np.sqrt(total))  # their greatest, rounded where they meet


def _cage(a: Anatomy, y: Field) -> Field:
    """The half width of the rib cage: a bell, closed at the lungs' tops, a little narrower again at the waist."""
    top, widest = a.cage
    return chord((np.maximum(widest - y, 0) / (widest - top)) ** 2) * (1 - 0.1 * rise(y - widest - 0.5, 1.0))


def _heart(v: View, a: Anatomy) -> Field:
    """1 where the heart and the great vessels hide the lungs; its left border slopes out to the apex."""
    (size, y), p, x = a.heart, a.pedicle, v.x - a.turn
    right = [(-0.6, p - 0.05), (-0.2, p), (y - 0.2, 0.25 * size), (y, 0.31 * size), (y + 0.2, 0.28 * size), (1, 0.2)]
    left = [(-0.6, p - 0.04), (-0.4, p), (-0.3, p + 0.03), (-0.15, p + 0.05), (y - 0.1, 0.47 * size)]
    left += [(y + 0.05, 0.55 * size), (y + 0.14, 0.54 * size), (y + 0.3, 0.47 * size), (1, 0.3)]
    return rise(outline(v.y, right) + x, 0.065) * rise(outline(v.y, left) - x, 0.065)


def _below_diaphragm(v: View, a: Anatomy) -> Field:
    """How far below its two domes a pixel lies; they fall off to the costophrenic angles at the sides."""
    out = np.abs(v.x) - 0.45
    fall = np.where(out > 0, 1.2 * out * out, 0.45 * out * out)
    return v.y - fall - a.domes[0] - (a.domes[1] - a.domes[0]) * rise(v.x, 0.4)


def _lungs(v: View, a: Anatomy) -> tuple[Field, Field]:
    """The share of air behind each pixel, before and after heart and diaphragm cover it."""
    q = (v.x / np.maximum(_cage(a, v.y - 0.04) - 0.02, 1e-3)) ** 2
    air = np.sqrt(chord(q)) * rise(v.y - a.cage[0] - 0.03, 0.2)
    return air, air * (1 - 0.85 * _heart(v, a)) * (1 - 0.9 * rise(_below_diaphragm(v, a), 0.035))


def _vessels(rng: np.random.Generator, v: View, a: Anatomy) -> Field:
    """Arteries and veins: from the hila they fork, wriggle and thin out."""
    from scipy.ndimage import gaussian_filter  # here: importing this module stays fast

    (h, w), (cx, cy, _, tilt) = v.x.shape, a.view
    total, step, sign = np.zeros((h, w), np.float32), 0.006, np.repeat((-1, 1), 10)
    x, y = sign * 0.24 + a.turn, rng.normal(-0.02, 0.09, 20)
    heading = np.tile(np.linspace(-1.4, 1.4, 10), 2) + rng.normal(0, 0.15, 20)  # a fan on either side
    for width in (0.013, 0.009, 0.006, 0.004):
        heading = heading + np.cumsum(rng.normal(0, 0.09, (24, x.size)), axis=0)
        x = x + sign * step * np.cumsum(np.cos(heading), axis=0)
        y = y + step * np.cumsum(np.sin(heading), axis=0)
        dx, dy = (x - cx) / v.pixel, (y - cy) * a.stature / v.pixel
        col = np.rint(dx * math.cos(tilt) + dy * math.sin(tilt) + (w - 1) / 2).astype(int)
        row = np.rint(dy * math.cos(tilt) - dx * math.sin(tilt) + (h - 1) / 2).astype(int)
        inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
        dots = np.bincount(row[inside] * w + col[inside], minlength=h * w).reshape(h, w).astype(np.float32)
        # a row of blurred dots is as bright as step and blur say; a vessel as it is thick
        total += gaussian_filter(dots, width / v.pixel) * np.float32(22 * width * 2.5 * step * width / v.pixel**2)
        x, y, heading = (np.concatenate((path[-1], path[rng.integers(8, 24)])) for path in (x, y, heading))
        heading += np.repeat(rng.uniform(0.15, 0.5, 2) * (1, -1), heading.size // 2)
        sign = np.tile(sign, 2)
    return a.vessels * total


def _opacities(rng: np.random.Generator, v: View, a: Anatomy) -> Field:
    """The share of the air lost to pneumonia: a lobe with a fuzzy edge, or patches around both hila."""
    if not a.opacity:
        return np.zeros_like(v.x)
    cloud = 0.6 * texture(rng, v, 0.3) + 0.4 * texture(rng, v, 0.1) + 0.25 * texture(rng, v, 0.04)
    if a.lobar:
        x = rng.choice((-1, -1, 1)) * rng.uniform(0.25, 0.6)  # the right lung more often
        lobe = ellipse(v, x, rng.uniform(-0.35, 0.4), rng.uniform(0.2, 0.45), rng.uniform(0.15, 0.4))
        return a.opacity * rise(1 - np.sqrt(lobe) + 0.25 * cloud, 0.9)
    hila = np.exp(-ellipse(v, 0, rng.uniform(0, 0.2), rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.6)))
    return 0.85 * a.opacity * rise(hila * (0.6 + 0.5 * cloud) - 0.45, 1.1)


def _airways(v: View, a: Anatomy) -> Field:
    """The trachea's strip of air, down to its fork, and the two main bronchi."""
    x, fork = -a.turn - 0.012, a.cage[0] + 0.42
    air = chord(((v.x - x) / 0.042) ** 2) * rise(fork - v.y, 0.05)
    for end in ((x - 0.2, fork + 0.16), (x + 0.2, fork + 0.12)):
        distance, along = stick(v, (x, fork - 0.02), end)
        air = np.maximum(air, 0.5 * chord((distance / 0.028) ** 2) * (1 - along))
    return air


def _ribs(v: View, a: Anatomy) -> Field:
    """Eleven pairs: a rib is a slanting ring, so its shadow is an ellipse, whose upper arc is the back.

    The lower arc is the front, and ends in cartilage; at the sides the beam runs along the bone, which is brightest.
    """
    pitch, slope, half, density, bulge = a.ribs
    cage = np.maximum(_cage(a, v.y), 0.05)
    widening = (np.maximum(_cage(a, v.y + 0.01), 0.05) - cage) * (100 * (1 - bulge))
    total = np.zeros_like(v.x)
    for i in range(11):
        drop = slope * (0.13 + 0.03 * i)  # from spine to side; the lower ones slant more
        middle = a.cage[0] + 0.06 + pitch * i + drop
        rows = np.abs(v.y[:, [0, -1]] - middle).min(axis=1) < drop + 0.06
        reach = (1 - bulge) * cage[rows] + bulge * float(_cage(a, np.full(1, middle, np.float32))[0])
        x, y = v.x[rows] / reach, (v.y[rows] - middle) / drop
        radius, sideways = np.sqrt(x * x + y * y) + 1e-3, np.minimum(x * x, 1)
        gradient = np.sqrt((x / reach) ** 2 + (y / drop - sideways / reach * widening[rows]) ** 2)
        front, lateral = rise(y * drop, 0.02), sideways**2
        thick = half * (1 - 0.3 * lateral) * (1 + 0.2 * front)
        seen = (1 - front) * rise(np.abs(v.x[rows]) - 0.08, 0.05) + 0.6 * front * rise(np.abs(x) - 0.55, 0.1)
        seen = seen * rise(cage[rows] - 0.2, 0.1)  # none above the lungs, where the cage closes
        total[rows] += (0.75 + 0.8 * lateral) * seen * bone(np.abs(radius - 1) * radius / gradient, thick)
    return density * total


def _spine(v: View, a: Anatomy) -> Field:
    """Vertebral bodies with bright end plates and sides, darker discs between them, pedicles, spinous processes."""
    x = v.x + a.turn / 2 + 0.3 * a.turn * np.sin(3 * v.y + 1)  # few are straight
    phase = np.abs((v.y - a.cage[0]) / a.ribs[0] % 1 - 0.5) * 2  # 0 in a vertebra's middle, 1 in a disc's
    half = 0.115 + 0.025 * np.clip(v.y, -1, 1)
    waist = half * (1 - 0.12 * (1 - phase) ** 2)
    pedicles = rise(1 - ((np.abs(x) - 0.6 * half) / 0.025) ** 2 - (phase / 0.35) ** 2, 1)
    processes = rise(1 - (x / 0.02) ** 2 - ((phase - 0.9) / 0.4) ** 2, 1)
    body: Field = 0.25 - 0.15 * rise(phase - 0.8, 0.12) + 0.12 * line(phase - 0.75, 0.07)
    body += 0.1 * line(np.abs(x) - waist + 0.012, 0.012) * (phase < 0.8)
    body += 0.12 * pedicles + 0.1 * processes
    return body * rise(waist - np.abs(x), 0.035)


def _shoulders(v: View, a: Anatomy) -> Field:
    """Clavicles, shoulder blades and the bones of the upper arms."""
    total = np.zeros_like(v.x)
    for sign, angle in zip((-1, 1), a.arms, strict=True):
        x = sign * (v.x - a.turn)
        lift = 0.05 + 0.3 * (1 - math.sin(max(angle, 0)))  # raised arms carry the clavicles' outer ends up
        clavicle = a.cage[0] + 0.13 - lift * (x - 0.1) - 0.04 * np.sin(7 * (x - 0.1))
        thick = (0.045 + 0.012 * np.abs(x - 0.45)) * np.sqrt(rise(x - 0.11, 0.06) * rise(0.86 - x, 0.08)) - 0.01
        total += 0.5 * bone(np.abs(v.y - clavicle) * 0.92, thick)
        distance, along = stick(v, *_arm(sign, angle, 1.3))
        growth_plate = 1 - 0.5 * line(along - 0.06, 0.008)
        total += 0.5 * growth_plate * bone(distance, 0.055 + 0.06 * np.exp(-14 * along))  # wide at the head
        blade = np.maximum(0.66 + 0.1 * (v.y + 0.5) - x, x - 0.98 + 0.4 * (v.y + 0.4))  # a triangle, negative inside
        blade = np.maximum(blade, -0.5 - v.y - 0.25 * (x - 0.7))
        total += 0.08 * rise(-blade, 0.03) + 0.08 * line(blade, 0.015) * rise(0.15 - v.y, 0.1)
        total += 0.2 * chord(ellipse(v, sign * 0.86, -0.5, 0.06, 0.1, sign * 0.5))  # the coracoid
    return total


def _devices(rng: np.random.Generator, v: View, a: Anatomy) -> Field:
    """Stomach tube, cables and electrodes."""
    tubes, cables, electrodes = a.devices
    total = 0.3 * tubes * bone(np.abs(v.x - 0.02 - 0.03 * np.sin(3 * v.y + 1)), 0.016) * rise(0.5 - v.y, 0.02)
    for _ in range(cables):
        slope, bend, at, wave = rng.normal(0, 0.7), rng.normal(0, 0.4), rng.uniform(-0.6, 0.7), rng.uniform(2, 4)
        away = np.abs(v.y - at - slope * v.x - bend * np.sin(wave * v.x)) / math.hypot(1, slope)
        total += 0.3 * bone(away, 0.012)
    for _ in range(electrodes):
        disc = ellipse(v, rng.uniform(-0.9, 0.9), rng.uniform(-0.6, 0.7), 0.045, 0.045 / a.stature)
        total += 0.5 * rise(1 - disc, 0.3) + 0.6 * rise(0.2 - disc, 0.2)
    return total


def _attenuation(rng: np.random.Generator, v: View, a: Anatomy) -> Field:
    """What the beam loses on its way to each pixel, as a natural logarithm: 0 in air, about 3 in the abdomen."""
    body, (lung, seen) = _body(v, a), _lungs(v, a)
    liver = rise(_below_diaphragm(v, a), 0.25)
    air = 0.51 * seen * (1 - _opacities(rng, v, a))
    air *= 1 + 0.035 * texture(rng, v, 0.018) + 0.03 * texture(rng, v, 0.08)
    total: Field = body * (2.6 * (1 - air) + 0.35 * liver + 0.05 * texture(rng, v, 0.15))
    total += _vessels(rng, v, a) * (0.3 * lung + 0.7 * seen) - 0.4 * _airways(v, a)
    if a.stomach:
        gas = ellipse(v, 0.5, a.domes[1] + 0.1 + a.stomach, 1.3 * a.stomach, a.stomach, 0.3)
        total -= 0.7 * rise(1 - gas + 0.4 * texture(rng, v, 0.2), 1.2)
    shown = rise(body - 0.05, 0.2) * (1 - 0.6 * liver)  # no bone outside the flesh; behind the liver they are dim
    total += shown * (_ribs(v, a) + _spine(v, a) + _shoulders(v, a)) + _devices(rng, v, a)
    return total


def _expose(loss: Field, v: View, a: Anatomy) -> Field:
    """The film's answer, 0 black to 1 white: the beam and its scatter through a logistic density curve."""
    from scipy.ndimage import gaussian_filter, uniform_filter

    mid_grey, contrast, scattered = a.film
    beam = np.exp(-gaussian_filter(loss, 0.6))
    reach = max(3, round(0.25 / v.pixel))
    haze = uniform_filter(uniform_filter(np.minimum(beam, 0.4), reach), reach)  # beside the patient little scatters
    exposure = ((1 - scattered) * beam + scattered * haze) * math.exp(mid_grey)
    grey: Field = np.clip(1.09 / (1 + exposure**contrast) - 0.05, 0, 1)  # as displayed: the air all black
    return grey


def _develop(rng: np.random.Generator, grey: Field, a: Anatomy) -> Image.Image:
    """Blacken the borders, add the grain and the letter, and round to 8 bits."""
    (w, h), (left, top, right, bottom), (strength, size) = a.size, a.borders, a.grain
    grey[: round(top * h)] = grey[h - round(bottom * h) :] = 0.02
    grey[:, : round(left * w)] = grey[:, w - round(right * w) :] = 0.02
    coarse = rng.standard_normal((max(1, round(h / size)), max(1, round(w / size))), dtype=np.float32)
    noise = enlarge(coarse, (w, h))
    # few quanta mean more noise, and the curve's flat ends hide it: so it depends on the grey
    grey = 255 * grey + 4 * strength * grey * np.sqrt(grey * (1 - grey)) * noise
    image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if a.marker:
        x, y, height = a.marker
        font = ImageFont.load_default(max(8, 1.4 * height * h))
        ImageDraw.Draw(image).text((x * w, y * h), "R", fill=245, font=font)
    return image.convert("RGB") if a.rgb else image


def draw_phantom(rng: np.random.Generator, *, pneumonia: bool) -> Image.Image:
    """Draw one phantom at its final size, 399 to 2890 pixels wide, as 0.84 to 3.2 times its height.

    It is grey (mode "L"); of those with pneumonia, 7 % are "RGB" with equal channels. The same state of `rng` gives the
    same image.
    """
    a = Anatomy.sample(rng, pneumonia=pneumonia)
    v = _view(a)
    grey = _expose(_attenuation(rng, v, a), v, a)
    return _develop(rng, np.clip(enlarge(grey, a.size), 0, 1), a)
