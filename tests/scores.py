"""Scores of images alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Reward


def score_images(
    rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str], **options: Any
) -> dict[str, np.ndarray]:
    """`score_drawn` of images whose latents no scorer reads."""
    return score_drawn(rewards, Drawn(images=images), prompts, **options)
