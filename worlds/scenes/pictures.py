"""Draws what a finished run changed: each prompt with the images of several versions from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from diffexpo.errors import MissingError
from diffexpo.evaluation.records import SuiteResult, load_run

ZOOM, FRAME, GAP = 2, 3, 10
RIGHT, WRONG, INK = "#2a9d4a", "#d64545", "#202020"


def load_versions(run: Path, versions: Sequence[str]) -> list[SuiteResult]:
    """Evaluations of a run by name: base, base-2.5, a contender, baseline, iteration-2; `last` is the last
    one.

    Raises:
        MissingError: the run has no such evaluation.
    """
    record = load_run(run)
    there = record.suites | {name: each.suite for name, each in record.contenders.items()}
    there["last"] = there[f"iteration-{record.iterations[-1]}"]
    if missing := [version for version in versions if version not in there]:
        raise MissingError(f"{run} has no evaluation of {', '.join(missing)}; there are {', '.join(there)}")
    return [there[version] for version in versions]


def draw_versions(suites: Sequence[SuiteResult], num: int, columns: int, judge: str) -> Image.Image:
    """The first `num` prompts, `columns` in a row: images of all versions side by side, in a green frame
    where the judge gives 1, else in a red one, and the prompt below."""
    size = suites[0].images.shape[1] * ZOOM + 2 * FRAME
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    width, height = len(suites) * (size + 2), size + 22
    rows = -(-num // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    pen = ImageDraw.Draw(page)
    for number, prompt in enumerate(suites[0].prompts[:num]):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + GAP)
        for place, suite in enumerate(suites):
            row = suite.row_of(prompt.id)
            if row is None:
                continue
            framed = Image.new("RGB", (size, size), RIGHT if suite.scores[judge][row] >= 1 else WRONG)
            framed.paste(_enlarged(suite.images[row]), (FRAME, FRAME))
            page.paste(framed, (left + place * (size + 2), top))
        pen.text((left, top + size + 3), prompt.text, fill=INK, font=font)
    return page


def _enlarged(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    return picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.LANCZOS)


def write_pictures(
    run: Path, out: Path, versions: Sequence[str], num: int, columns: int, judge: str = "correct"
) -> Path:
    """Draw a finished run's versions on its first evaluation prompts into a PNG."""
    draw_versions(load_versions(run, versions), num, columns, judge).save(out)
    return out
