"""Foreign pictures: decode bytes that may be anything, and fit them to the model's size. Without torch."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffexpo.errors import ImportFormatError

MAX_PIXELS = 64 * 1024 * 1024
FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: object) -> Image.Image:
    """An RGB picture from the bytes of a JPEG, PNG or WebP file; transparency is laid on white.

    Raises:
        ImportFormatError: the message is a short reason that can be counted: "no bytes", "not an image",
            "more than 64 megapixels", "truncated or damaged".
    """
    if not isinstance(data, bytes) or not data:
        raise ImportFormatError("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImportFormatError("more than 64 megapixels") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ImportFormatError("not an image") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ImportFormatError("more than 64 megapixels")
        try:
            image.load()
            return _on_white(image)
        except (OSError, SyntaxError, ValueError, IndexError, struct.error) as error:
            raise ImportFormatError("truncated or damaged") from error


def fit_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The picture as uint8 (height, width, 3): centre crop, then bicubic; untouched if it fits."""
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        crop_width, crop_height = width * scale, height * scale
        left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
        box = (left, top, left + crop_width, top + crop_height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(image, dtype=np.uint8)


def nearest_size(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of several sizes (height, width) the one nearest in shape to a picture, the earlier of two that are as
    near.

    nearest = argmin over sizes of |log(width / height) - log(picture's width / height)|

    Returns:
        The size; for a picture 30 wide and 20 high among (16, 16) and (12, 20) it is (12, 20).
    """
    shape = math.log(image.width / image.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - shape))


def size_name(height: object, width: object) -> str:
    """How a size is written in counts, e.g. "832x1216"."""
    return f"{height}x{width}"


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 (H,W,3): lossless, so nothing is lost by storing a picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
