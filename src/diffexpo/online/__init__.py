"""Exploring, judging and the outer loop. The public functions of this room."""

from diffexpo.online.advantages import PerPromptStats, group_advantages
from diffexpo.online.explore import constant, cosine_decay, linear_decay, off
from diffexpo.online.pairing import best_and_worst, best_dominating

__all__ = [
    "PerPromptStats",
    "best_and_worst",
    "best_dominating",
    "constant",
    "cosine_decay",
    "group_advantages",
    "linear_decay",
    "off",
]
