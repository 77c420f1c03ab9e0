"""ImageReward: card of `rewards/imagereward.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import NetworkCard


class ImageRewardCard(NetworkCard):
    """BLIP with a head, trained on human rankings."""

    scorer: ClassVar[str] = "ImageRewardScorer"
    what: ClassVar[str] = "ImageReward v1.0: human rankings, BLIP with a head"
    unit: ClassVar[str] = "standardised reward, about -2 to 2"
    path_is: ClassVar[str] = "ImageReward as .safetensors"
    base_is: ClassVar[str] = "bert-base-uncased folder or hub id (tokenizer)"
    default_base: ClassVar[str | None] = "google-bert/bert-base-uncased"
    source: ClassVar[str] = (
        "hub repository THUDM/ImageReward, ImageReward.pt, 2 GB, converted once (docs/rewards/imagereward.md)"
    )
    licence: ClassVar[str] = "Apache-2.0"
    pickled_entry: ClassVar[str | None] = ""
    parameters: ClassVar[int | None] = 447_000_000  # both towers, about
    score_range: ClassVar[tuple[float, float] | None] = (-4.0, 4.0)
    papers: ClassVar[tuple[str, ...]] = ("xu2023imagereward",)

    type: Literal["imagereward"] = "imagereward"
