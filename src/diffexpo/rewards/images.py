"""Images as scorers take them: at 8 bits, resized, cropped, padded and normalised as officially done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from diffexpo.errors import RewardError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B,3,H,W) in [0,1] to uint8 (B,H,W,3): round(255 x), clamped, as a saved PNG would hold them."""
    quantised = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return quantised.permute(0, 2, 3, 1).cpu().contiguous().numpy()


def quantise(images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [0,1] at 8 bits, float32 again. Quantising twice changes nothing."""
    return (images.detach().float() * 255).round().clamp(0, 255) / 255


def check_lengths(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Raise RewardError if images and prompts differ in number."""
    if len(images) != len(prompts):
        raise RewardError(f"reward {name!r}: {len(images)} images but {len(prompts)} prompts")


def shortest_side_crop(images: Tensor, size: int) -> Tensor:
    """Shortest side to `size` (PIL bicubic on 8 bits), centre crop, normalised.

    The longer side becomes int(size * long / short); the crop starts at round((side - size) / 2), half to
    even. Images (B,3,H,W) in [0,1] are rounded to 8 bits and become (B,3,size,size) float32; a white one is
    (1 - mean) / std everywhere.

    Source: the transform of CLIP and ImageReward (torchvision Resize and CenterCrop on PIL images).
    """
    squares = []
    for image in to_bytes(images):
        height, width, _ = image.shape
        short = min(height, width)
        target = (int(size * width / short), int(size * height / short))
        resized = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
        top, left = (round((side - size) / 2) for side in resized.shape[:2])
        squares.append(resized[top : top + size, left : left + size])
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
    return normalised(pixels)


def longest_side_pad(images: Tensor, size: int) -> Tensor:
    """Longest side to `size` (antialiased bicubic on floats, overshoot kept), black padding to a square,
    normalised.

    Images (B,3,H,W) in [0,1] are rounded to 8 bits first and become (B,3,size,size) float32; what is padded
    is (0 - mean) / std.

    Source: the transform of HPSv2. Its antialiasing follows torchvision's version, here it is always on; an
        image whose longest side is `size` already is left unpadded there (and only works if it is square),
        here it is padded too.
    """
    pixels = quantise(images)
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    target = (round(height * scale), round(width * scale))
    if target != (height, width):
        pixels = interpolate(pixels, size=target, mode="bicubic", align_corners=False, antialias=True)
    free_height, free_width = size - target[0], size - target[1]
    left, top = free_width // 2, free_height // 2
    return normalised(pad(pixels, (left, free_width - left, top, free_height - top)))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (B,3,H,W) with CLIP's mean and standard deviation taken out."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    return (pixels - mean) / std
