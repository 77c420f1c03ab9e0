"""Scenes: small images of emoji sprites whose prompts say exactly what has to be seen (no torch at import).

A prompt names one or two kinds of things with their colours, counts and relative position, or one person at
work, in the manner of GenEval (arXiv 2310.11513). `grammar` holds the prompts, `compose` draws true images
of them; whether a generated image is right is decided by the checkers of `diffexpo.rewards.scenes`.
"""

from __future__ import annotations

from diffexpo.types import Prompt
from diffexpo.worlds.scenes.grammar import LENGTHS, prompts_of, scenes_of
from diffexpo.worlds.scenes.people import (
    NEGATED,
    PEOPLE,
    Labelled,
    negated_prompts,
    people_prompts,
    true_people,
)

ASSETS = {
    "diffusion": "diffusion",
    "checker_train": "checker_train",
    "checker_heldout": "checker_heldout",
    "looks_train": "looks_train",
    "looks_heldout": "looks_heldout",
    "offline": "offline.parquet",
    "negatives": "negatives.txt",
}
LISTS = (*LENGTHS, "heldout", PEOPLE, NEGATED)


def labelled(name: str) -> list[Labelled] | None:
    """Images whose prompts' attributes say what they show: people; None for other names."""
    return true_people() if name == PEOPLE else None


def prompts(name: str) -> list[Prompt] | None:
    """The list of prompts of a name of `LISTS`; None for other names."""
    if name in (PEOPLE, NEGATED):
        return people_prompts() if name == PEOPLE else negated_prompts()
    return prompts_of(scenes_of(name)) if name in LISTS else None
