"""Pictures for a page that needs no other file: images as data URIs, of a sane size, and montages of many."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_SIDE = 1600
"""Pixels along the longer side of a picture on a page."""
MAX_BYTES = 400_000
"""Of a file that is taken as it is."""
TILE, GAP = 112, 3
"""Pixels along a side of an image in a montage, and between two."""
COLUMNS = 6


@dataclass(frozen=True)
class Picture:
    """A picture on a page."""

    title: str
    alt: str
    uri: str
    width: int
    height: int
    note: str = ""
    dark_uri: str = ""
    """The same for a dark page; empty where one serves both."""


def data_uri(kind: str, content: bytes) -> str:
    """Content as a URI: `data:image/png;base64,…`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def load_picture(path: Path, title: str, alt: str, max_side: int = MAX_SIDE) -> Picture | None:
    """A picture from a file; made smaller where it is huge, and then said so. None where it is no picture."""
    try:
        with Image.open(path) as image:
            size, kind = image.size, image.format
            if kind == "PNG" and max(size) <= max_side and path.stat().st_size <= MAX_BYTES:
                image.verify()
                return Picture(title, alt, data_uri("image/png", path.read_bytes()), *size)
            shown = image.convert("L" if image.mode in ("1", "L", "I;16", "I") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    note = f"made smaller, from {size[0]} × {size[1]} pixels: {path}" if shown.size != size else ""
    return Picture(title, alt, data_uri("image/jpeg", as_jpeg(shown)), shown.width, shown.height, note)


def as_jpeg(image: Image.Image) -> bytes:
    """A tenth of the size of a PNG of X-rays; the difference shows in no report."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, optimize=True)
    return buffer.getvalue()


def montage(paths: Sequence[Path], title: str, alt: str) -> Picture | None:
    """Grey images side by side, each at most TILE pixels wide; None where there are none or one can't be read."""
    tiles = []
    for path in paths:
        try:
            with Image.open(path) as image:
                tile = image.convert("L")
        except (OSError, ValueError):
            return None
        tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        tiles.append(tile)
    if not tiles:
        return None
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    columns = min(COLUMNS, len(tiles))
    size = (columns * (width + GAP) + GAP, -(-len(tiles) // columns) * (height + GAP) + GAP)
    whole = Image.new("L", size, 255)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        whole.paste(tile, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return Picture(title, alt, data_uri("image/jpeg", as_jpeg(whole)), *whole.size)
