"""PickScore: card of `rewards/pickscore.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import VIT_H, VIT_H_PARAMETERS, ClipLikeCard

PICKSCORE = "yuvalkirstain/PickScore_v1"


class PickScoreCard(ClipLikeCard):
    """A CLIP ViT-H/14 trained on human choices."""

    scorer: ClassVar[str] = "PickScoreReward"
    what: ClassVar[str] = "PickScore v1: human choices on Pick-a-Pic"
    unit: ClassVar[str] = "cosine times the logit scale, about 20 to 22"
    path_is: ClassVar[str] = "PickScore folder or hub id"
    default_path: ClassVar[str | None] = PICKSCORE
    base_is: ClassVar[str] = "CLIP ViT-H/14 folder or hub id (tokenizer and image processor)"
    default_base: ClassVar[str | None] = VIT_H
    source: ClassVar[str] = f"hub repository {PICKSCORE}, 4 GB"
    licence: ClassVar[str] = "code MIT; weights: see the model card"
    parameters: ClassVar[int | None] = VIT_H_PARAMETERS
    papers: ClassVar[tuple[str, ...]] = ("kirstain2023pickapic",)

    type: Literal["pickscore"] = "pickscore"
