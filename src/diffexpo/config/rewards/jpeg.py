"""File size as a reward, with either sign: cards of `rewards/jpeg.py`."""

from typing import Literal

from diffexpo.config.rewards.card import RewardCard


class JpegCard(RewardCard):
    """What both signs share."""

    papers = ("black2024ddpo",)
    # JPEG sizes move a little with the library inside Pillow.
    score_slack = 2e-2
    never_cached = "costs less than looking a score up"

    @property
    def known_scores(self) -> str | None:
        """Every machine gives nearly the same."""
        return f"{self.type}.json" if self.path is None and self.scale is None else None


class JpegCompressibilityCard(JpegCard):
    """Smooth, plain images win."""

    scorer = "JpegCompressibility"
    what = "- JPEG size; reads no prompt"
    unit = "negative kB"
    score_range = (-30.0, -0.3)

    type: Literal["jpeg_compressibility"] = "jpeg_compressibility"


class JpegIncompressibilityCard(JpegCard):
    """Detailed, noisy images win."""

    scorer = "JpegIncompressibility"
    what = "+ JPEG size; reads no prompt"
    unit = "kB"
    score_range = (0.3, 30.0)

    type: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
