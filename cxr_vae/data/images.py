"""One image file to one square of 8-bit grey: the only place that knows about image formats on the way in."""

import io
import warnings
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

PNG_STRATEGY = zlib.Z_RLE
"""How PNGs are compressed, without loss in any case: of X-rays faster than the default by four, and smaller by 2 %."""

MIN_SIDE = 16
"""Smaller images are rejected: nothing in them is a chest."""

Fit = Literal["stretch", "letterbox", "crop"]


class UnreadableImageError(Exception):
    """Why a file is no usable image, in a few words."""


def decode_grey(content: bytes) -> Image.Image:
    """A JPEG or PNG file's content as an 8-bit grey PIL image of its own size.

    Colour becomes luma (ITU-R 601), for in the Kaggle set the number of channels gives the label away; 16-bit grey is
    scaled to 8 bits over its full range; transparency lies over black; EXIF orientation is applied.
    Raises UnreadableImageError.
    """
    if not content:
        raise UnreadableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
            file.load()
            image: Image.Image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise UnreadableImageError("not a JPEG or PNG image") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError("too many pixels to be an X-ray (a decompression bomb?)") from None
    except MemoryError:
        raise  # no fault of the image
    except Exception as error:  # PIL's parsers raise nearly anything for broken data, EXIF above all
        raise UnreadableImageError(f"damaged: {error}") from None
    if min(image.size) < MIN_SIDE:
        raise UnreadableImageError(f"{image.width} x {image.height} pixels, expected at least {MIN_SIDE} a side")
    if image.mode.startswith("I"):
        wide = np.asarray(image, np.float64)  # 0…65535
        return Image.fromarray(np.rint(wide / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, (0, 0, 0, 255)), colour).convert("L")
    return image.convert("L")


def to_square(image: Image.Image, size: int, fit: Fit) -> npt.NDArray[np.uint8]:
    """(size, size) uint8 of a grey image, resized with PIL's antialiased bilinear filter.

    stretch: both axes to `size`, as the reference does, which distorts; letterbox: the whole image between black
    bars; crop: the largest central square.
    """
    bilinear = Image.Resampling.BILINEAR
    if fit == "stretch":
        square = image.resize((size, size), bilinear)
    elif fit == "letterbox":
        square = ImageOps.pad(image, (size, size), bilinear, color=0)
    else:
        square = ImageOps.fit(image, (size, size), bilinear)
    return np.asarray(square, np.uint8)


def colour_mode(path: Path) -> str | None:
    """PIL's name for what an image file's pixels are (`L` grey, `RGB`, …), from its head; None where it is no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                return str(image.mode)
    except (OSError, Image.DecompressionBombError):
        return None
