r"""Text in images: what is asked for in quotes in the prompt, against what a text recogniser reads.

    score = 1 - min(d, n) / n,    d = 0 if the target stands in the text read, else the edit distance;  n =
    len(target)

Spaces and case do not count.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.images import check_lengths, to_bytes
from diffexpo.rewards.python_file import BlameCode

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


def quoted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes, straight or typographic; None if there is none."""
    match = _QUOTED.search(prompt)
    if match is None:
        return None
    return match[1] or match[2]


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other
    (Levenshtein)."""
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

    Args:
        target: Text asked for; spaces and case do not count.
        read: Everything that was read, in order.
    Returns:
        A number in [0, 1]; "hello world" against "HELLOWORLD 24" is 1, "open" against "oven" 0.75.
    Raises:
        RewardError: the target has no character but spaces.
    Source: Flow-GRPO (arXiv 2505.05470), section 4.1 and its code.
    """
    wanted, found = ("".join(text.split()).casefold() for text in (target, read))
    if not wanted:
        raise RewardError(f"the text asked for is {target!r}; expected at least one character")
    distance = 0 if wanted in found else edit_distance(wanted, found)
    return 1 - min(distance, len(wanted)) / len(wanted)


class OcrReward:
    """Reads the image with rapidocr and compares with the text in quotes in the prompt.

    A prompt without quoted text asks for none: its images get no score (NaN, counted).

    Args:
        name: Name in metrics.
    Raises:
        MissingError: rapidocr is not installed.
    """

    scale = "share of the text, 0 to 1"

    def __init__(self, name: str) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise MissingError(
                f"reward {name!r}: rapidocr cannot be imported ({error}); install it with `pip install "
                f'"diffexpo[ocr]"`'
            ) from error
        self.name = name
        self.version = f"rapidocr {package_version('rapidocr')}"
        self._blame = BlameCode(f"reward {name!r}: rapidocr", "look at its message")
        with self._blame:
            self._engine = RapidOCR()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) in [0, 1] of images (B,3,H,W); NaN for prompts without text in quotes.

        Raises:
            RewardError: images and prompts differ in number, or the recogniser failed.
        """
        check_lengths(self.name, images, prompts)
        scores = []
        for pixels, prompt in zip(to_bytes(images), prompts, strict=True):
            target = quoted_text(prompt)
            readable = target is not None and bool(target.strip())
            scores.append(
                text_match(str(target), self.read(Image.fromarray(pixels))) if readable else torch.nan
            )
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, image: Image.Image) -> str:
        """All texts found in an image, in the recogniser's order."""
        with self._blame:
            texts = self._engine(image).txts
        return " ".join(texts or ())


def package_version(package: str) -> str:
    """Version of an installed package, "unknown" if it does not say."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
