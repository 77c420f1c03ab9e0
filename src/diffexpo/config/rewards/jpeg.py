"""File size as a reward, with either sign: cards of `rewards/jpeg.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard


class JpegCard(RewardCard):
    """What both signs share."""

    papers: ClassVar[tuple[str, ...]] = ("black2024ddpo",)
    # JPEG sizes move a little with the library inside Pillow.
    score_slack: ClassVar[float] = 2e-2
    never_cached: ClassVar[str] = "costs less than looking a score up"

    @property
    def known_scores(self) -> str | None:
        """Every machine gives nearly the same."""
        return f"{self.type}.json" if self.path is None and self.scale is None else None


class JpegCompressibilityCard(JpegCard):
    """Smooth, plain images win."""

    scorer: ClassVar[str] = "JpegCompressibility"
    what: ClassVar[str] = "- JPEG size; reads no prompt"
    unit: ClassVar[str] = "negative kB"
    score_range: ClassVar[tuple[float, float] | None] = (-30.0, -0.3)

    type: Literal["jpeg_compressibility"] = "jpeg_compressibility"


class JpegIncompressibilityCard(JpegCard):
    """Detailed, noisy images win."""

    scorer: ClassVar[str] = "JpegIncompressibility"
    what: ClassVar[str] = "+ JPEG size; reads no prompt"
    unit: ClassVar[str] = "kB"
    score_range: ClassVar[tuple[float, float] | None] = (0.3, 30.0)

    type: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
