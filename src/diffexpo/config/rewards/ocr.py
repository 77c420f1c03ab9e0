"""Text in images: card of `rewards/ocr.py`."""

from typing import Literal

from diffexpo.config.rewards.card import RewardCard


class OcrCard(RewardCard):
    """Text that is asked for against text that is read."""

    scorer = "OcrReward"
    what = "the text in quotes in the prompt against the text read in the image"
    unit = "1 - edit distance / length, 0 to 1"
    source = 'pip install "diffexpo[ocr]" (models inside)'
    licence = "rapidocr and its models Apache-2.0"
    papers = ("rapidocr",)

    type: Literal["ocr"] = "ocr"
