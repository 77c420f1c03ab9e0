"""Pictures from outside: decoded exactly, or refused for a reason that can be counted."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from diffexpo.data.images import encode_png, fit_image, on_white


def test_png_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(Image.open(io.BytesIO(encode_png(pixels))), 5, 7), pixels)


def test_transparency_is_laid_on_white() -> None:
    assert on_white(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


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


def test_an_image_is_turned_as_its_file_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for orientation, turned in (
        (1, pixels),
        (3, pixels[::-1, ::-1]),
        (6, np.rot90(pixels, -1)),
        (8, np.rot90(pixels)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
        np.testing.assert_array_equal(np.array(on_white(Image.open(buffer))), turned)


def test_grey_of_16_bits_keeps_its_greys() -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    shown = np.array(on_white(Image.fromarray(grey)))
    assert shown[0, :, 0].tolist() == [0, 1, 128, 255]
