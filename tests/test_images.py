import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_vae.data.images import UnreadableImageError, decode_grey, to_square

RAMP = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey(content: bytes) -> np.ndarray:
    return np.asarray(decode_grey(content))


def test_grey_png_comes_back_as_it_is() -> None:
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP))), RAMP)


def test_equal_channels_give_the_same_grey() -> None:
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP).convert("RGB"))), RAMP)


def test_colour_becomes_luma() -> None:
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    assert abs(int(grey(encoded(red))[0, 0]) - 0.299 * 255) <= 1  # ITU-R 601


def test_16_bit_keeps_its_full_range() -> None:
    wide = RAMP.astype(np.uint16) * 257
    assert np.array_equal(grey(encoded(Image.fromarray(wide))), RAMP)


def test_palette_cmyk_and_binary_are_converted() -> None:
    image = Image.fromarray(RAMP)
    assert np.abs(grey(encoded(image.convert("P"))).astype(int) - RAMP).max() <= 3
    cmyk = grey(encoded(image.convert("CMYK"), "JPEG", quality=100)).astype(int)
    assert np.abs(cmyk - RAMP).max() <= 4
    assert set(np.unique(grey(encoded(image.convert("1"))))) == {0, 255}


def test_transparency_lies_over_black() -> None:
    alpha = np.full_like(RAMP, 255)
    alpha[:, :20] = 0
    image = Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(alpha)))
    result = grey(encoded(image))
    assert result[:, :20].max() == 0
    assert np.array_equal(result[:, 20:], RAMP[:, 20:])


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert grey(encoded(Image.fromarray(RAMP), "JPEG", exif=exif)).shape == RAMP.shape[::-1]


@pytest.mark.filterwarnings("ignore")  # PIL warns of broken EXIF
def test_broken_exif_gives_an_image_or_a_reason_but_no_traceback() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a chest, from in front", 72.0
    whole = exif.tobytes()
    reasons = set()
    for position in range(6, len(whole)):  # behind "Exif"
        for value in (0, 5, 13, 255):
            broken = whole[:position] + bytes([value]) + whole[position + 1 :]
            try:
                decode_grey(encoded(Image.fromarray(RAMP), "JPEG", exif=broken))
            except UnreadableImageError as error:
                reasons.add(str(error))
    assert reasons  # PIL raised something
    assert all(reason.startswith("damaged: ") for reason in reasons)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"this is a text", "not a JPEG or PNG image"),
        (encoded(Image.fromarray(RAMP), "GIF"), "not a JPEG or PNG image"),
        (encoded(Image.fromarray(np.tile(RAMP, (8, 8))), "JPEG")[:2000], "damaged"),
        (encoded(Image.fromarray(RAMP))[:-40], "damaged"),
        (encoded(Image.new("L", (1, 1))), "1 x 1 pixels"),
        (encoded(Image.new("L", (400, 1))), "400 x 1 pixels"),
    ],
)
def test_unusable_files_say_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode_grey(content)


def test_a_flipped_bit_in_png_data_is_noticed() -> None:
    content = bytearray(encoded(Image.fromarray(RAMP)))
    content[len(content) // 2] ^= 4
    with pytest.raises(UnreadableImageError, match="damaged"):
        decode_grey(bytes(content))


def test_stretch_is_the_references_resize() -> None:
    from torchvision.transforms import functional

    image = Image.fromarray(RAMP)
    expected = np.asarray(functional.resize(image, [24, 24]))
    assert np.array_equal(to_square(image, 24, "stretch"), expected)


def test_letterbox_and_crop_keep_the_aspect() -> None:
    wide = Image.fromarray(np.full((40, 80), 200, np.uint8))
    letterbox = to_square(wide, 40, "letterbox")
    assert letterbox[:9].max() == 0
    assert letterbox[12:28].min() == 200
    halves = Image.fromarray(np.repeat([[50, 200, 200, 90]], 40, 0).repeat(20, 1).astype(np.uint8))
    assert to_square(halves, 40, "crop").min() > 190  # the outer quarters are cut off
