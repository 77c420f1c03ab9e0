"""Images of scenes that look worse by known degrees, from which a judge of looks learns.

Every kind of damage has a strength in [0, 1]: 0 leaves the image as it is, at 1 nobody would keep it. An
image with the same strengths as another and one of them raised looks worse, whatever it shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffexpo.worlds.scenes.compose import (
    BACKGROUNDS,
    CELL,
    IMAGE_SIZE,
    PERSON_CELL,
    Placed,
    compose,
    sprites,
)
from diffexpo.worlds.scenes.grammar import COLOURS, OBJECTS, Scene
from worlds.scenes.spoil import WAYS, lay, spoil

KINDS = {
    "blur": "the image is blurred",
    "noise": "fine or coarse noise lies over the image",
    "warp": "shapes are bent",
    "holes": "round pieces of sprites are missing",
    "broken": "a sprite is cut off, blended or joined with another, smeared, or faded",
    "fade": "sprites are washed out",
    "mottle": "a sprite's colour runs into another one",
    "ghosts": "faint sprites lie in the background",
    "stains": "the background has coloured patches",
    "crowd": "sprites overlap or are cut off by the border",
}
"""Every kind of damage, and what it does."""


def _smooth(rng: np.random.Generator, cells: int, channels: int) -> np.ndarray:
    """Smooth noise (64, 64, channels) of unit variance at `cells` x `cells` nodes, bilinear between them."""
    nodes = rng.normal(size=(cells, cells, channels))
    place = np.linspace(0, cells - 1, IMAGE_SIZE)
    low = np.minimum(place.astype(int), cells - 2)
    share = (place - low)[:, None, None]
    rows = nodes[low] * (1 - share) + nodes[low + 1] * share
    share = share.reshape(1, -1, 1)
    mixed: np.ndarray = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return mixed


def blur(image: np.ndarray, strength: float) -> np.ndarray:
    """Blur an image (H, W, C) by up to six passes of a box of 3 x 3 pixels, a part of a pass at the end."""
    for index in range(int(np.ceil(6 * strength))):
        soft = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        soft = (soft[:-2] + soft[1:-1] + soft[2:]) / 3
        soft = (soft[:, :-2] + soft[:, 1:-1] + soft[:, 2:]) / 3
        image = image + min(1.0, 6 * strength - index) * (soft - image)
    return image


def add_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise of a standard deviation up to 0.14, in grains of 1, 2 or 4 pixels."""
    grain = int(rng.choice([1, 2, 4]))
    size = IMAGE_SIZE // grain
    return image + 0.14 * strength * np.kron(rng.normal(size=(size, size, 3)), np.ones((grain, grain, 1)))


def warp(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel by smooth noise of a standard deviation up to 3 pixels."""
    way = 3 * strength * _smooth(rng, 9, 2)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    y, x = ((axis + way[..., i]).clip(0, IMAGE_SIZE - 1.001) for i, axis in enumerate((y, x)))
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[..., None], (x - left)[..., None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    bent: np.ndarray = upper * (1 - down) + lower * down
    return bent


def _holes(sprite: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cut two discs out of a sprite (S, S, 4), each around an opaque pixel, of a radius up to S / 4."""
    size = len(sprite)
    y, x = np.mgrid[0:size, 0:size]
    opaque = np.argwhere(sprite[..., 3] > 0.5)
    for top, left in opaque[rng.integers(len(opaque), size=2)]:
        distance = np.hypot(y - top, x - left)
        sprite = sprite * (distance - size / 4 * strength).clip(0, 1)[..., None]
    return sprite


def _mottled(sprite: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Let the colour of another look into half of a sprite's opaque pixels."""
    share = _smooth(rng, 8, 1)[: len(sprite), : len(sprite)]
    share = (share > np.median(share[sprite[..., 3] > 0.5])) * strength
    return sprite * (1 - share) + other * share


def _other_look(placed: Placed, rng: np.random.Generator) -> np.ndarray:
    """The sprite of the same name in another look."""
    looks = [key for key in sprites() if key[0] == placed.name and key[1] != placed.look]
    return sprites()[looks[int(rng.integers(len(looks)))]].astype(np.float32) / 255


def _another(placed: Placed, rng: np.random.Generator) -> np.ndarray:
    """A sprite of another name and the same size."""
    is_thing = placed.name in OBJECTS
    keys = [key for key in sprites() if (key[0] in OBJECTS) == is_thing and key[0] != placed.name]
    return sprites()[keys[int(rng.integers(len(keys)))]].astype(np.float32) / 255


def _damaged_sprite(
    placed: Placed, damage: Mapping[str, float], is_worst: bool, rng: np.random.Generator
) -> np.ndarray:
    """A sprite with its own damages; `is_worst`: the one sprite of an image that is broken and mottled."""
    sprite = sprites()[placed.name, placed.look].astype(np.float32) / 255
    if is_worst and (strength := damage.get("mottle", 0.0)):
        sprite = _mottled(sprite, _other_look(placed, rng), strength, rng)
    if strength := damage.get("holes", 0.0):
        sprite = _holes(sprite, strength, rng)
    if is_worst and (strength := damage.get("broken", 0.0)):
        way = WAYS[int(rng.integers(len(WAYS)))]
        sprite = sprite + strength * (spoil(sprite, _another(placed, rng), way, rng) - sprite)
    return sprite * (1 - 0.7 * damage.get("fade", 0.0))


def _moved(placed: list[Placed], strength: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Corners of the sprites' cells; one of them is moved into another one's, or over the nearest border, by
    up to half a cell."""
    size = CELL if placed[0].name in OBJECTS else PERSON_CELL
    corners = [(each.y - size // 2, each.x - size // 2) for each in placed]
    if not strength:
        return corners
    index, amount = int(rng.integers(len(placed))), round(strength * size / 2)
    if len(placed) > 1 and rng.random() < 0.5:
        y, x = corners[(index + 1) % len(placed)]
        dy, dx = corners[index][0] - y, corners[index][1] - x
        apart, part = max(abs(dy), abs(dx)), size - amount
        corners[index] = (round(y + dy * part / apart), round(x + dx * part / apart))
        return corners
    y, x = corners[index]
    ways = {
        (-amount, x): y,
        (IMAGE_SIZE - size + amount, x): IMAGE_SIZE - size - y,
        (y, -amount): x,
        (y, IMAGE_SIZE - size + amount): IMAGE_SIZE - size - x,
    }
    corners[index] = min(ways, key=lambda way: ways[way])
    return corners


def _background(damage: Mapping[str, float], rng: np.random.Generator) -> np.ndarray:
    """One of the pale backgrounds, with stains and ghosts."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image[:] = np.array(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], dtype=np.float32) / 255
    if strength := damage.get("stains", 0.0):
        patches = (_smooth(rng, 7, 1) - 0.4).clip(0, 1) * rng.uniform(0.2, 1.0, 3)
        image -= (0.4 * strength * patches).astype(np.float32)
    if strength := damage.get("ghosts", 0.0):
        for y, x in rng.integers(-4, IMAGE_SIZE - CELL + 5, (int(rng.integers(1, 4)), 2)):
            name = OBJECTS[int(rng.integers(len(OBJECTS)))]
            ghost = sprites()[name, COLOURS[int(rng.integers(len(COLOURS)))]].astype(np.float32) / 255
            lay(image, ghost * (0.05 + 0.4 * strength), int(y), int(x))
    return image


def draw_damaged(
    scene: Scene, damage: Mapping[str, float], layout: np.random.Generator, rng: np.random.Generator
) -> np.ndarray:
    """Draw a scene (64, 64, 3) of float in [0, 1] with damages of these strengths, by name of `KINDS`.

    Args:
        layout: draws what the scene leaves open, and the background's place in the random numbers of
            `compose`. rng: draws where the damage lies.
    """
    placed = compose(scene, layout)[1]
    image = _background(damage, rng)
    worst = int(rng.integers(len(placed)))
    corners = _moved(placed, damage.get("crowd", 0.0), rng)
    for index, (each, (y, x)) in enumerate(zip(placed, corners, strict=True)):
        lay(image, _damaged_sprite(each, damage, index == worst, rng), y, x)
    if strength := damage.get("warp", 0.0):
        image = warp(image, strength, rng)
    if strength := damage.get("blur", 0.0):
        image = blur(image, strength)
    if strength := damage.get("noise", 0.0):
        image = add_noise(image, strength, rng)
    return image.clip(0, 1).astype(np.float32)
