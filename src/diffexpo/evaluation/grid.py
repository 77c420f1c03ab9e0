"""Labelled grids of images and small encodings for the report, with Pillow and NumPy alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffexpo.errors import DataError
from diffexpo.evaluation.records import SuiteResult
from diffexpo.files import replacing
from diffexpo.types import Prompt

_PAD = 6


def image_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    tile: int = 128,
) -> Image.Image:
    """One labelled sheet: prompts (above their images) down, models across.

    `rows` holds per prompt its images (H,W,3) uint8, one per column; None leaves a hole. Each is shown with a
    side of `tile` pixels, so that the RGB image has width columns * (tile + 6) + 6.
    """
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        labels = f"{len(row_labels)} row labels, {len(column_labels)} column labels"
        raise DataError(f"image grid: {len(rows)} rows, {labels}")
    font, line = ImageFont.load_default(size=13), 20
    width = len(column_labels) * (tile + _PAD) + _PAD
    sheet = Image.new("RGB", (width, line + len(rows) * (tile + line + _PAD)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        draw.text((_PAD + column * (tile + _PAD), 2), _fit(draw, label, tile, font), fill="black", font=font)
    for index, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = line + index * (tile + line + _PAD)
        draw.text((_PAD, top + 2), _fit(draw, label, width - 2 * _PAD, font), fill="#444444", font=font)
        for column, image in enumerate(images):
            if image is not None:
                small = Image.fromarray(image).resize((tile, tile), Image.Resampling.LANCZOS)
                sheet.paste(small, (_PAD + column * (tile + _PAD), top + line))
    return sheet


def save_grid(path: Path, sheet: Image.Image) -> None:
    """Write a sheet as PNG so that a reader never sees half of it."""
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def save_comparison(
    path: Path, versions: Sequence[tuple[str, SuiteResult]], prompts: Sequence[Prompt], *, tile: int = 128
) -> None:
    """Write the sheet of each prompt's first image by every version (label, suite)."""
    drawn = [[(suite, suite.row_of(prompt.id)) for _, suite in versions] for prompt in prompts]
    rows = [[None if at is None else suite.images[at] for suite, at in row] for row in drawn]
    labels = [prompt.text for prompt in prompts], [name for name, _ in versions]
    save_grid(path, image_grid(rows, *labels, tile=tile))


def data_uri(array: np.ndarray) -> str:
    """An image (H,W,3) uint8 in its own size as a data URI: PNG if it is small, else JPEG."""
    image = Image.fromarray(array)
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= 96 else "jpeg"
    if kind == "png":
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _fit(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
