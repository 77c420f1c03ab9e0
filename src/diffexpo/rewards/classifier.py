"""Any scorer of an image for a text as a classifier: the value whose text scores best.

p(value) = softmax_value( score(image, text of the value) / temperature )
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffexpo.types import Reward

_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def fill_text(text: str, prompt: str) -> str:
    """A value's text for a prompt: `fill_text("a woman {noun}", "a judge")` is "a woman judge"."""
    return text.replace("{prompt}", prompt).replace("{noun}", _ARTICLE.sub("", prompt.strip()))


def value_probabilities(
    scorer: Reward,
    texts: Mapping[str, str],
    images: Tensor,
    prompts: Sequence[str],
    temperature: float = 1.0,
) -> Tensor:
    """Probability of each value for each image.

    Args:
        scorer: Scores (B,) of images for texts; not one that compares images.
        texts: Value -> text, with `{prompt}` and `{noun}`.
        images, prompts: (B,3,H,W) in [0,1], and the prompts that they were drawn for.
        temperature: > 0; the smaller, the surer.
    Returns:
        (B, K) float32 in the order of `texts`; a row is NaN where a score is missing. Scores 1 and 0 at
        temperature 1 give 0.731 and 0.269.
    Raises:
        RewardError: the scorer cannot read a text.
    """
    scores = torch.stack(
        [scorer.score(images.clone(), [fill_text(text, one) for one in prompts]) for text in texts.values()],
        dim=1,
    )
    found = torch.softmax(scores.float() / temperature, dim=1)
    return torch.where(torch.isfinite(scores).all(dim=1, keepdim=True), found, torch.nan)
