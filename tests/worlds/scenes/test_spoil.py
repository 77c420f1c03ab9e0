"""Spoilt sprites: they differ from whole ones, and the labels say which they are."""

from __future__ import annotations

import numpy as np
import pytest

from diffexpo.worlds.scenes.compose import BACKGROUNDS, sprites
from worlds.scenes.spoil import SPOILT_SHARE, WAYS, spoil, spoilt_scene


@pytest.mark.parametrize("way", WAYS)
def test_a_spoilt_sprite_is_far_from_the_whole_one(way: str) -> None:
    every = {key: sprite.astype(np.float32) / 255 for key, sprite in sprites().items()}
    rng = np.random.default_rng(0)
    whole, other = every["key", "red"], every["car", "blue"]
    spoilt = spoil(whole, other, way, rng)
    assert spoilt.shape == whole.shape and np.isfinite(spoilt).all()
    # A blurred key keeps the most: it still differs by a fifth of the whole sprite's mean.
    assert np.abs(spoilt - whole).mean() > 0.2 * whole.mean()


def test_labels_say_what_is_whole_and_where() -> None:
    rng = np.random.default_rng(1)
    drawn = [spoilt_scene(rng) for _ in range(400)]
    labels = [label for _, found in drawn for label in found]
    share = 1 - np.mean([label.is_good for label in labels])
    assert abs(share - SPOILT_SHARE) < 3 * (SPOILT_SHARE / len(labels)) ** 0.5
    whole = [(image, label) for image, found in drawn for label in found if label.is_good]
    light = min(min(colour) for colour in BACKGROUNDS) / 255 - 0.05
    for image, label in whole:
        y, x = int(label.y), int(label.x)
        # Something other than background lies within a cell around the centre.
        assert image[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8].min() < light
