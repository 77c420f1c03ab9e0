"""Augmented images keep what they show."""

from __future__ import annotations

import torch

from diffexpo.worlds import emoji
from worlds.emoji.corrupt import augment


def test_augmenting_keeps_white_corners_and_strength_zero_changes_nothing() -> None:
    pictures = torch.from_numpy(emoji.load_images(["noto-1f525", "twemoji-1f355"]))
    same = augment(pictures, torch.Generator().manual_seed(1), 0.0)
    # Coordinates up to 64 pixels are rounded by 4e-6 on either axis, and neighbours differ by at most 1.
    torch.testing.assert_close(same, pictures, atol=2e-5, rtol=0)
    moved = augment(pictures, torch.Generator().manual_seed(1))
    assert float((moved - pictures).abs().mean()) > 0.005 and float(moved[:, :, 0, 0].min()) > 0.7
