"""Images in memory: fit them to the model's size, encode them. Without torch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def fit_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The image as uint8 (height, width, 3): centre crop, then bicubic; untouched if it fits."""
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        crop_width, crop_height = width * scale, height * scale
        left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(image, dtype=np.uint8)


def nearest_size(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of several sizes (height, width) the one nearest in shape to an image, the earlier of two that are as
    near.

    nearest = argmin over sizes of |log(width / height) - log(image's width / height)|

    Returns:
        The size; for an image 30 wide and 20 high among (16, 16) and (12, 20) it is (12, 20).
    """
    shape = math.log(image.width / image.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


def size_name(height: object, width: object) -> str:
    """How a size is written in counts, e.g. "832x1216"."""
    return f"{height}x{width}"


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 (H,W,3): lossless, so nothing is lost by storing an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
