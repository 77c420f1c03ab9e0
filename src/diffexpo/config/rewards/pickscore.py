"""PickScore: card of `rewards/pickscore.py`."""

from typing import Literal

from diffexpo.config.rewards.card import VIT_H, VIT_H_PARAMETERS, ClipLikeCard

PICKSCORE = "yuvalkirstain/PickScore_v1"


class PickScoreCard(ClipLikeCard):
    """A CLIP ViT-H/14 trained on human choices."""

    scorer = "PickScoreReward"
    what = "PickScore v1: human choices on Pick-a-Pic"
    unit = "cosine times the logit scale, about 20 to 22"
    path_is = "PickScore folder or hub id"
    default_path = PICKSCORE
    base_is = "CLIP ViT-H/14 folder or hub id (tokenizer and image processor)"
    default_base = VIT_H
    source = f"hub repository {PICKSCORE}, 4 GB"
    licence = "code MIT; weights: see the model card"
    parameters = VIT_H_PARAMETERS
    papers = ("kirstain2023pickapic",)
    biases = "rises with guidance alone; prompts are read up to 77 tokens"

    type: Literal["pickscore"] = "pickscore"
