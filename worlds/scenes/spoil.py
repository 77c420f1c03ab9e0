"""Images with spoilt sprites, from which checkers learn what does not count as a thing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffexpo.worlds.scenes.compose import BACKGROUNDS, CELL, GRID, IMAGE_SIZE, PERSON_CELL, sprites
from diffexpo.worlds.scenes.grammar import COLOURS, OBJECTS

SPOILT_SHARE = 0.16
PERSON_SHARE = 0.1
WAYS = ("half", "blend", "chimera", "smear", "fade")


@dataclass(frozen=True)
class Labelled:
    """A sprite of a training image; `is_good` is false for a spoilt one."""

    name: str
    look: str
    y: float
    x: float
    is_good: bool


def spoil(sprite: np.ndarray, other: np.ndarray, way: str, rng: np.random.Generator) -> np.ndarray:
    """Spoil a sprite (cell, cell, 4) of float: cut off, blended or joined with another, blurred, or faded."""
    size = len(sprite)
    if way == "half":
        kept = np.ones((size, size, 1), dtype=np.float32)
        kept[: int(size * rng.uniform(0.4, 0.65))] = 0
        return sprite * np.rot90(kept, int(rng.integers(4)))
    if way == "blend":
        share = rng.uniform(0.35, 0.65)
        return sprite * share + other * (1 - share)
    if way == "chimera":
        kept = np.zeros((size, size, 1), dtype=np.float32)
        kept[: size // 2] = 1
        kept = np.rot90(kept, int(rng.integers(4)))
        return sprite * kept + other * (1 - kept)
    if way == "smear":
        for _ in range(int(rng.integers(5, 9))):
            for axis in (0, 1):
                sprite = (np.roll(sprite, 1, axis) + sprite + np.roll(sprite, -1, axis)) / 3
        return sprite
    return sprite * rng.uniform(0.25, 0.5)


def lay(image: np.ndarray, sprite: np.ndarray, y: int, x: int) -> None:
    """Lay a sprite of float over an image of float, its cell's corner at (y, x), cut at the borders."""
    size = len(sprite)
    top, left = max(0, -y), max(0, -x)
    bottom, right = min(size, IMAGE_SIZE - y), min(size, IMAGE_SIZE - x)
    part = image[y + top : y + bottom, x + left : x + right]
    seen = sprite[top:bottom, left:right]
    part[:] = part * (1 - seen[..., 3:]) + seen[..., :3]


def _corners(rng: np.random.Generator, num: int) -> list[tuple[int, int]]:
    """Corners of cells of things that overlap by two pixels at most, mostly but not always on the grid."""
    step = GRID if rng.random() < 0.5 else 1
    while True:
        corners = rng.integers(0, (IMAGE_SIZE - CELL) // step + 1, (num, 2)) * step
        gaps = np.abs(corners[:, None] - corners[None]).max(-1) + IMAGE_SIZE * np.eye(num, dtype=int)
        if gaps.min() >= CELL - 2:
            return [(int(y), int(x)) for y, x in corners]


def _choose(rng: np.random.Generator, keys: list[tuple[str, str]]) -> tuple[str, str]:
    return keys[int(rng.integers(len(keys)))]


def spoilt_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[Labelled]]:
    """Draw an image (64, 64, 3) in [0, 1] of one to four things or one person, any of which may be spoilt."""
    every = {key: sprite.astype(np.float32) / 255 for key, sprite in sprites().items()}
    people = [key for key in every if key[0] not in OBJECTS]
    things = [key for key in every if key[0] in OBJECTS]
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = np.array(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]) / 255 + rng.normal(0, 0.008)
    if rng.random() < PERSON_SHARE:
        keys, pool, cell = [_choose(rng, people)], people, PERSON_CELL
        corners = [(int(y), int(x)) for y, x in rng.integers(4, 21, (1, 2))]
    else:
        num, cell, pool = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.36, 0.24, 0.2])), CELL, things
        name, colour = _choose(rng, things)
        is_same = rng.random() < 0.4
        keys = [
            (
                name if is_same else OBJECTS[int(rng.integers(len(OBJECTS)))],
                colour if rng.random() < 0.5 else COLOURS[int(rng.integers(len(COLOURS)))],
            )
            for _ in range(num)
        ]
        corners = _corners(rng, num)
    labels = []
    for key, (y, x) in zip(keys, corners, strict=True):
        sprite, is_good = every[key], rng.random() >= SPOILT_SHARE
        if not is_good:
            other = _choose(rng, [each for each in pool if each[0] != key[0]])
            sprite = spoil(sprite, every[other], WAYS[int(rng.integers(len(WAYS)))], rng)
        lay(image, sprite, y, x)
        labels.append(Labelled(*key, y + cell / 2, x + cell / 2, is_good))
    return image.clip(0, 1), labels
