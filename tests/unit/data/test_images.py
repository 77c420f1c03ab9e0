"""Pictures from outside: decoded exactly, or refused for a reason that can be counted."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from diffexpo.data.images import encode_png, fit_image


def test_png_is_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(Image.open(io.BytesIO(encode_png(pixels))), 5, 7), pixels)


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
