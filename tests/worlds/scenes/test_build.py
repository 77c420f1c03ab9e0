"""The shipped sheets of sprites are those that the code makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffexpo.worlds.scenes.compose import ASSETS
from worlds.scenes.build import build_sprites, fit_into, opacity


def test_the_shipped_sheets_are_made_again(tmp_path: Path) -> None:
    build_sprites(tmp_path)
    for name in ("things.png", "people.png"):
        with Image.open(tmp_path / name) as made, Image.open(ASSETS / name) as shipped:
            # Resizing in floating point may round a value differently on another processor.
            difference = np.abs(np.asarray(made, dtype=int) - np.asarray(shipped, dtype=int))
        assert difference.max() <= 1


def test_white_inside_is_kept_and_white_outside_is_not() -> None:
    image = np.ones((9, 9, 3), dtype=np.float32)
    image[2:7, 2:7] = 0.2
    image[4, 4] = 1.0
    inside = opacity(image)
    assert inside[4, 4] == 1 and inside[0, 0] == 0 and inside.sum() == 25
    sprite = fit_into(image, inside, 24)
    assert sprite.shape == (24, 24, 4) and (sprite[..., :3] <= sprite[..., 3:]).all()
