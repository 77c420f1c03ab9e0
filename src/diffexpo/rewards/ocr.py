r"""Text in images: what is asked for in quotes in the prompt, against what a text recogniser reads.

    score = 1 - min(d, n) / n,   n = len(target)
    d = 0 if the target is part of the text read, else the edit distance

Spaces and case do not count.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from PIL import Image

from diffexpo.errors import RewardError
from diffexpo.rewards.foreign import PackageReward

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes, straight or typographic; None if there is none."""
    match = _QUOTED.search(prompt)
    return match and (match[1] or match[2])


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of characters between two texts."""
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, 1):
        current = [row]
        for column, right in enumerate(second, 1):
            change = previous[column - 1] + (left != right)
            current.append(min(change, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]


def text_match(target: str, read: str) -> float:
    """How much of a text was read.

        1 - min(d, n) / n      with d = 0 where the target is part of the text read

    Spaces and case do not count: "hello world" against "HELLOWORLD 24" is 1, "open" against "oven" 0.75.

    Raises:
        RewardError: the target has no character but spaces.
    Source: Flow-GRPO (arXiv 2505.05470), section 4.1 and its code.
    """
    wanted, found = ("".join(text.split()).casefold() for text in (target, read))
    if not wanted:
        raise RewardError(f"the text asked for is {target!r}; expected at least one character")
    distance = 0 if wanted in found else edit_distance(wanted, found)
    return 1 - min(distance, len(wanted)) / len(wanted)


class OcrReward(PackageReward):
    """Reads the image with rapidocr and compares with the text in quotes in the prompt.

    A prompt without quoted text asks for none: its images get no score (NaN, counted).
    """

    package, extra = "rapidocr", "ocr"
    scale = "share of the text, 0 to 1"

    def _build(self, module: Any) -> Any:
        return module.RapidOCR()

    def _rate(self, pixels: np.ndarray, prompt: str) -> float:
        target = quoted_text(prompt)
        if target is None or not target.strip():
            return math.nan
        texts = self._model(Image.fromarray(pixels)).txts
        return text_match(target, " ".join(texts or ()))
