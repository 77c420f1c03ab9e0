"""Makes the sheets of sprites from the single emoji: cut out, recoloured, and scaled to the cells."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from diffexpo.worlds.emoji import load_images, load_rows
from diffexpo.worlds.scenes.compose import CELL, PERSON_CELL
from diffexpo.worlds.scenes.grammar import COLOURS, GENDERS, OBJECTS, OCCUPATIONS, TONES

CODES = {
    "car": "1F697", "tree": "1F333", "fish": "1F41F", "star": "2B50", "heart": "2764", "cat": "1F431",
    "dog": "1F436", "apple": "1F34E", "house": "1F3E0", "umbrella": "2602", "bird": "1F426", "book": "1F4D5",
    "boat": "26F5", "key": "1F511", "mushroom": "1F344", "bell": "1F514", "crown": "1F451", "hat": "1F3A9",
}  # fmt: skip
"""Code point of every object's emoji (Twemoji)."""
TINTS = {
    "red": (222, 38, 48),
    "orange": (250, 132, 20),
    "yellow": (250, 212, 40),
    "green": (60, 168, 72),
    "blue": (52, 116, 232),
    "purple": (150, 72, 200),
}
WHITE = 0.93


def opacity(image: np.ndarray) -> np.ndarray:
    """1 inside and 0 outside of an emoji (H, W, 3) on white: outside is the white that reaches the border."""
    white = image.min(-1) > WHITE
    height, width = white.shape
    border = [
        (y, x) for y in range(height) for x in range(width) if y in (0, height - 1) or x in (0, width - 1)
    ]
    outside, queue = np.zeros(white.shape, dtype=bool), deque(border)
    while queue:
        y, x = queue.popleft()
        if 0 <= y < height and 0 <= x < width and white[y, x] and not outside[y, x]:
            outside[y, x] = True
            queue.extend([(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)])
    return (~outside).astype(np.float32)


def recolour(image: np.ndarray, inside: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Give an emoji another colour by luminance: its usual brightness becomes the colour, darker parts become
    its shades, lighter ones its tints."""
    target = np.array(colour, dtype=np.float32) / 255
    luminance = image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    saturation = image.max(-1) - image.min(-1)
    body = luminance[(inside > 0.5) & (luminance > 0.12) & ((saturation > 0.25) | (luminance < 0.8))]
    middle = float(np.median(body)) if len(body) else 0.5
    bright = luminance[..., None]
    shade = target * np.clip(0.25 + 0.75 * bright / middle, 0, 1)
    lift = np.clip((bright - middle) / max(1 - middle, 1e-3), 0, 1)
    return np.where(bright <= middle, shade, target + (1 - target) * lift**1.2 * 0.95)


def fit_into(image: np.ndarray, inside: np.ndarray, cell: int) -> np.ndarray:
    """Crop to what is inside and scale to cell - 1 pixels, in the middle of a cell (cell, cell, 4) of uint8,
    colours multiplied by the opacity."""
    rows, columns = np.where(inside > 0.5)
    crop = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    layers = np.dstack([image[crop] * inside[crop][..., None], inside[crop]])
    scale = (cell - 1) / max(layers.shape[:2])
    height, width = (max(4, round(side * scale)) for side in layers.shape[:2])
    resized = [
        np.asarray(Image.fromarray(layers[..., k]).resize((width, height), Image.Resampling.LANCZOS))
        for k in range(4)
    ]
    sprite = (np.clip(np.dstack(resized), 0, 1) * 255).round().astype(np.uint8)
    sprite[..., :3] = np.minimum(sprite[..., :3], sprite[..., 3:])
    out = np.zeros((cell, cell, 4), dtype=np.uint8)
    top, left = (cell - height) // 2, (cell - width) // 2
    out[top : top + height, left : left + width] = sprite
    return out


def _save_sheet(cells: list[list[np.ndarray]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack([np.hstack(row) for row in cells])).save(path, optimize=True)


def build_sprites(out: Path) -> None:
    """Write `things.png` (objects x colours) and `people.png` (occupations x looks) to a folder."""
    rows = [row for row in load_rows() if row["style"] == "twemoji"]
    by_code = {row["hexcode"].removesuffix("-FE0F"): row["id"] for row in rows}
    people = {(row["occupation"], row["gender"], row["skin_tone"]): row["id"] for row in rows}

    def image_of(row_id: str) -> tuple[np.ndarray, np.ndarray]:
        image = load_images([row_id])[0].transpose(1, 2, 0)
        return image, opacity(image)

    things = []
    for name in OBJECTS:
        image, inside = image_of(by_code[CODES[name]])
        things.append([fit_into(recolour(image, inside, TINTS[c]), inside, CELL) for c in COLOURS])
    _save_sheet(things, out / "things.png")
    looks = [(gender, tone) for gender in GENDERS for tone in TONES]
    _save_sheet(
        [[fit_into(*image_of(people[name, *look]), PERSON_CELL) for look in looks] for name in OCCUPATIONS],
        out / "people.png",
    )
