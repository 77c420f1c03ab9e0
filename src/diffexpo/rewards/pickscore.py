"""PickScore: a CLIP ViT-H/14 that was trained on human choices between two images of a prompt."""

from __future__ import annotations

from diffexpo.rewards.clip import ClipReward


class PickScoreReward(ClipReward):
    """exp(logit_scale) cos(text, image) by the weights of PickScore.

    Its own repository holds only the network; tokenizer and image processor are those of `base`.
    Source: PickScore (arXiv 2305.01569), equation 1 without the softmax over the images of a prompt, which
        gives a number of a comparison, not of an image.
    """
