"""Pictures from outside: decoded exactly, or refused for a reason that can be counted."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffexpo.data.images import decode_image, encode_png, fit_image
from diffexpo.errors import ImportFormatError

from .conftest import jpeg


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no bytes"),
        (b"", "no bytes"),
        ("text", "no bytes"),
        (b"this is not an image", "not an image"),
        (jpeg("x")[:10], "not an image"),
        (jpeg("x", size=(64, 64))[:800], "truncated or damaged"),
        (png_header(8, 8), "truncated or damaged"),
        (png_header(8193, 8192), "more than 64 megapixels"),
        (png_header(12000, 12000), "more than 64 megapixels"),
        (png_header(60000, 60000), "more than 64 megapixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(data: object, reason: str) -> None:
    with pytest.raises(ImportFormatError, match=f"^{reason}$"):
        decode_image(data)


def test_png_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(decode_image(encode_png(pixels)), 5, 7), pixels)


def test_transparency_is_laid_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_fitting_cuts_the_sides_not_the_middle() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    fitted = fit_image(Image.fromarray(wide), 8, 8)
    np.testing.assert_array_equal(fitted, np.full((8, 8, 3), 200, np.uint8))


def test_fitting_scales_by_pillows_bicubic() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    np.testing.assert_array_equal(
        fit_image(image, 16, 16), np.array(image.resize((16, 16), Image.Resampling.BICUBIC))
    )
