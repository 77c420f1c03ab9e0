"""JPEG size as DDPO defines it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffexpo.errors import RewardError
from diffexpo.rewards.images import quantise, to_bytes
from diffexpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility


def test_size_is_pillows_default_at_quality_95() -> None:
    images = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    expected = []
    for image in images.numpy():
        # DDPO's own steps: round to 8 bits, HWC, Image.save(quality=95), bytes / 1000.
        picture = Image.fromarray((image * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    grow = JpegIncompressibility("grow").score(images, ["", "", ""])
    shrink = JpegCompressibility("shrink").score(images, ["", "", ""])
    assert torch.equal(grow, torch.tensor(expected)) and torch.equal(shrink, -grow)


def test_noise_is_larger_than_a_plain_colour() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), torch.rand(3, 64, 64)])
    plain, noise = JpegIncompressibility("size").score(images, ["", ""])
    assert noise > 3 * plain


def test_lengths_must_agree() -> None:
    with pytest.raises(RewardError, match="2 images but 1 prompts"):
        JpegCompressibility("size").score(torch.zeros(2, 3, 8, 8), [""])


def test_quantising_is_idempotent_and_rounds_half_to_even() -> None:
    images = torch.tensor([-0.2, 0.5 / 255, 1.5 / 255, 0.7, 1.3]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_bytes(images)[0, 0, :, 0].tolist() == [0, 0, 2, 178, 255]
    once = quantise(images)
    assert torch.equal(quantise(once), once)
    assert np.array_equal(to_bytes(once), to_bytes(images))
