"""File size as a reward: no network, no taste, and a ranking that anyone can recompute."""

from __future__ import annotations

import io
from collections.abc import Sequence

import PIL
import torch
from PIL import Image
from torch import Tensor

from diffexpo.rewards.images import check_lengths, to_bytes

QUALITY = 95
SUBSAMPLING_4_2_0 = 2


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Sizes (B,) of images (B,3,H,W) in [0,1] as JPEGs, in bytes / 1000.

    A 16 x 16 black image is 0.631 with libjpeg-turbo 3. Source: DDPO (arXiv 2305.13301) appendix; quality 95
    and 4:2:0 are Pillow's settings in its code, stated here explicitly.
    """
    sizes = []
    for image in to_bytes(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY, subsampling=SUBSAMPLING_4_2_0)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegIncompressibility:
    """+ JPEG size in kB: detailed, noisy images win."""

    version = f"pillow {PIL.__version__} quality {QUALITY} 4:2:0"
    scale = "kB"
    sign = 1.0

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Signed sizes (B,) of images (B,3,H,W); the prompts are not read."""
        check_lengths(self.name, images, prompts)
        return self.sign * jpeg_kilobytes(images)


class JpegCompressibility(JpegIncompressibility):
    """- JPEG size in kB: smooth, plain images win."""

    scale = "negative kB"
    sign = -1.0
