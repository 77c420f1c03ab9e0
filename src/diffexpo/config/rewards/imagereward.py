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
    papers: ClassVar[tuple[str, ...]] = ("xu2023imagereward",)

    type: Literal["imagereward"] = "imagereward"

    @property
    def num_parameters(self) -> int:
        """Of both towers of BLIP, about."""
        return 447_000_000

    @property
    def usual_range(self) -> tuple[float, float]:
        """About twice what is usual."""
        return (-4.0, 4.0)
