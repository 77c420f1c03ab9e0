"""Draws true images of scenes from the shipped sprites: integers only, so every machine draws the same.

An image has 64 x 64 pixels. Sprites of things lie in cells of 24 pixels whose corners stand on the 8-pixel
grid of the latents; a person fills a cell of 40. No two cells overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from diffexpo.worlds.scenes.grammar import COLOURS, GENDERS, OBJECTS, OCCUPATIONS, TONES, Person, Scene

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "scenes"
IMAGE_SIZE = 64
GRID = 8
CELL, PERSON_CELL = 24, 40
BACKGROUNDS = ((255, 255, 255), (255, 247, 224), (226, 242, 255), (234, 248, 230))
# cos of the angle to the named direction: a drawn relation is this clear, one that is read at least that.
DRAWN_CLARITY, READ_CLARITY = 0.88, 0.72
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Placed:
    """A sprite in an image; `look`: the colour of a thing, "gender tone" of a person; y, x: its centre."""

    name: str
    look: str
    y: int
    x: int


@lru_cache(maxsize=1)
def sprites() -> dict[tuple[str, str], np.ndarray]:
    """Every sprite (cell, cell, 4) of uint8, colours multiplied by the opacity, by name and look."""
    things = _cells(ASSETS / "things.png", CELL)
    people = _cells(ASSETS / "people.png", PERSON_CELL)
    looks = [f"{gender} {tone}" for gender in GENDERS for tone in TONES]
    return {
        **{
            (name, colour): things[i, j] for i, name in enumerate(OBJECTS) for j, colour in enumerate(COLOURS)
        },
        **{(name, look): people[i, j] for i, name in enumerate(OCCUPATIONS) for j, look in enumerate(looks)},
    }


def _cells(path: Path, size: int) -> np.ndarray:
    """A sheet of sprites as (rows, columns, size, size, 4)."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGBA"), dtype=np.uint8)
    rows, columns = sheet.shape[0] // size, sheet.shape[1] // size
    return sheet.reshape(rows, size, columns, size, 4).swapaxes(1, 2)


def clarity(relation: str, first: tuple[float, float], second: tuple[float, float]) -> float:
    """Cosine between the named direction and the way from the second centre (y, x) to the first."""
    down, right = _DIRECTIONS[relation]
    dy, dx = first[0] - second[0], first[1] - second[1]
    return (dy * down + dx * right) / max(math.hypot(dy, dx), 1e-6)


def _corners(rng: np.random.Generator, num: int, relation: str | None) -> list[tuple[int, int]]:
    """Corners of `num` cells that do not overlap, the first two in the relation."""
    low, high = (1, 5) if num == 1 else (0, (IMAGE_SIZE - CELL) // GRID + 1)
    apart = CELL // GRID
    while True:
        corners = rng.integers(low, high, (num, 2))
        gaps = np.abs(corners[:, None] - corners[None]).max(-1) + apart * np.eye(num, dtype=int)
        if gaps.min() < apart:
            continue
        found = [(int(y) * GRID, int(x) * GRID) for y, x in corners]
        if relation is None or clarity(relation, found[0], found[1]) > DRAWN_CLARITY:
            return found


def compose(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """Draw a scene: an image (64, 64, 3) of uint8 and what lies where.

    What the scene leaves open is drawn: colours, gender, skin tone, places, and one of the `BACKGROUNDS`.
    """
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    if scene.person is not None:
        corner = rng.integers(1, 3, 2) * GRID
        return image, [paste(image, *_sprite_of(scene.person, rng), (int(corner[0]), int(corner[1])))]
    wanted = [
        (thing.name, colour)
        for thing in scene.things
        for colour in [thing.colour or COLOURS[int(rng.integers(len(COLOURS)))]]
        for _ in range(thing.count)
    ]
    corners = _corners(rng, len(wanted), scene.relation)
    return image, [paste(image, *sprite, corner) for sprite, corner in zip(wanted, corners, strict=True)]


def _sprite_of(person: Person, rng: np.random.Generator) -> tuple[str, str]:
    gender = person.gender or GENDERS[int(rng.integers(len(GENDERS)))]
    return person.name, f"{gender} {person.tone or TONES[int(rng.integers(len(TONES)))]}"


def paste(image: np.ndarray, name: str, look: str, corner: tuple[int, int]) -> Placed:
    """Lay a sprite over an image of uint8, in place; `corner` is the upper left one of its cell (y, x)."""
    sprite = sprites()[name, look].astype(np.uint16)
    size, (y, x) = len(sprite), corner
    part = image[y : y + size, x : x + size]
    part[:] = sprite[..., :3] + (part * (255 - sprite[..., 3:]) + 127) // 255
    return Placed(name, look, y + size // 2, x + size // 2)
