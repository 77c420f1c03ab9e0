"""Text in images: card of `rewards/ocr.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard


class OcrCard(RewardCard):
    """Text that is asked for against text that is read."""

    scorer: ClassVar[str] = "OcrReward"
    what: ClassVar[str] = "the text in quotes in the prompt against the text read in the image"
    unit: ClassVar[str] = "1 - edit distance / length, 0 to 1"
    source: ClassVar[str] = 'pip install "diffexpo[ocr]" (models inside)'
    licence: ClassVar[str] = "rapidocr and its models Apache-2.0"
    papers: ClassVar[tuple[str, ...]] = ("rapidocr",)

    type: Literal["ocr"] = "ocr"
