"""Scenes: small images of emoji sprites whose prompts say exactly what has to be seen (no torch at import).

A prompt names one or two kinds of things with their colours, counts and relative position, or one person at
work, in the manner of GenEval (arXiv 2310.11513). `grammar` holds the prompts, `compose` draws true images
of them; whether a generated image is right is decided by the checkers of `diffexpo.rewards.scenes`.
"""

from __future__ import annotations

from diffexpo.types import Prompt
from diffexpo.worlds.scenes.grammar import LENGTHS, prompts_of, scenes_of

ASSETS = {
    "diffusion": "diffusion",
    "checker_train": "checker_train",
    "checker_heldout": "checker_heldout",
    "looks_train": "looks_train",
    "looks_heldout": "looks_heldout",
    "offline": "offline.parquet",
    "negatives": "negatives.txt",
}
LISTS = (*LENGTHS, "heldout")


def prompts(name: str) -> list[Prompt] | None:
    """The list of prompts of a name: train, validation, new, unseen or heldout; None for other names."""
    return prompts_of(scenes_of(name)) if name in LISTS else None
