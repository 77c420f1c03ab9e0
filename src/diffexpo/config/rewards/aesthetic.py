"""LAION's aesthetic predictors: card of `rewards/aesthetic.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import VIT_L, VIT_L_PARAMETERS, NetworkCard


class AestheticCard(NetworkCard):
    """A head on the image vectors of a CLIPModel."""

    scorer: ClassVar[str] = "AestheticReward"
    what: ClassVar[str] = "LAION aesthetic v1 (linear) or v2 (MLP), by the file; reads no prompt"
    unit: ClassVar[str] = "rating, about 1 to 10"
    path_is: ClassVar[str] = "the head as .safetensors"
    base_is: ClassVar[str] = "CLIPModel folder or hub id"
    default_base: ClassVar[str | None] = VIT_L
    source: ClassVar[str] = (
        "GitHub christophschuhmann/improved-aesthetic-predictor (v2), LAION-AI/aesthetic-predictor (v1), "
        "converted once (docs/rewards/aesthetic.md)"
    )
    licence: ClassVar[str] = "v2 Apache-2.0, v1 MIT"
    pickled_entry: ClassVar[str | None] = ""
    parameters: ClassVar[int | None] = VIT_L_PARAMETERS
    score_range: ClassVar[tuple[float, float] | None] = (0.0, 11.0)
    papers: ClassVar[tuple[str, ...]] = ("schuhmann2022laion", "radford2021clip")

    type: Literal["aesthetic"] = "aesthetic"
