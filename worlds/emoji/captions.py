"""Draws (image, caption) pairs for the base models: the balance of concepts, the skewed unstated
attributes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from worlds.emoji.attributes import (
    GENDERS,
    SKIN_TONES,
    STYLES,
    UNSTATED_GENDERS,
    UNSTATED_SHARE,
    UNSTATED_TONES,
    is_train,
)

# Shares of the captions of one draw; the rest is the plain label with the style.
EMPTY_SHARE = 0.08
LABEL_AND_WORDS_SHARE = 0.12
WORDS_SHARE = 0.08
NO_STYLE_SHARE = 0.04

CONCEPT_POWER = (
    0.4  # a concept with n images a style is drawn n**0.4 times as often as one with a single image
)
GROUP_WEIGHTS = {
    "smileys-emotion": 1.5,
    "animals-nature": 1.5,
    "food-drink": 1.5,
    "travel-places": 1.2,
    "objects": 1.2,
    "activities": 1.2,
    "symbols": 0.8,
    "flags": 0.8,
    "letters": 0.5,
}
FAMILY_WEIGHT = 0.3
OCCUPATION_WEIGHT = 2.0


class CaptionedDraws:
    """Draws rows of the train split and a caption for each.

    An occupation's caption leaves gender and tone out with probability `UNSTATED_SHARE`; the image then
    comes from the documented skewed mix, so that a model trained on the draws answers "firefighter" with that
    mix.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._triples: dict[tuple[str, str, str, str], int] = {}
        for index, row in enumerate(rows):
            if not is_train(row):
                continue
            groups[row["concept"], row["style"]].append(index)
            if row["occupation"]:
                self._triples[row["occupation"], row["style"], row["gender"], row["skin_tone"]] = index
        self._members = list(groups.values())
        weights = np.array([self._weight(members) for members in self._members])
        self._probabilities = weights / weights.sum()

    def _weight(self, members: list[int]) -> float:
        row = self.rows[members[0]]
        weight = len(members) ** CONCEPT_POWER * GROUP_WEIGHTS.get(row["group"], 1.0)
        weight *= OCCUPATION_WEIGHT if row["occupation"] else 1.0
        return weight * (FAMILY_WEIGHT if row["subgroup"] == "family" else 1.0)

    def draw(self, draw: np.random.Generator, num: int) -> tuple[list[int], list[str]]:
        """Return `num` row indices and as many captions."""
        indices, captions = [], []
        for concept in draw.choice(len(self._members), size=num, p=self._probabilities):
            members = self._members[concept]
            index = members[int(draw.integers(len(members)))]
            row = self.rows[index]
            if row["occupation"] and draw.random() < UNSTATED_SHARE:
                index = self._unstated(row, draw)
                caption = f"{row['style']} {row['occupation']}"
                captions.append("" if draw.random() < EMPTY_SHARE else caption)
            else:
                captions.append(self._caption(row, draw))
            indices.append(index)
        return indices, captions

    def _unstated(self, row: dict[str, Any], draw: np.random.Generator) -> int:
        while True:  # a held-out triple is drawn again
            gender = draw.choice(GENDERS, p=[UNSTATED_GENDERS[name] for name in GENDERS])
            tone = draw.choice(SKIN_TONES, p=[UNSTATED_TONES[name] for name in SKIN_TONES])
            index = self._triples.get((row["occupation"], row["style"], str(gender), str(tone)))
            if index is not None:
                return index

    def _caption(self, row: dict[str, Any], draw: np.random.Generator) -> str:
        assert row["style"] in STYLES
        kind = draw.random()
        if kind < EMPTY_SHARE:
            return ""
        kind -= EMPTY_SHARE
        if kind < NO_STYLE_SHARE:
            return row["caption"]
        kind -= NO_STYLE_SHARE
        words = row["keywords"]
        if len(words) >= 2 and kind < LABEL_AND_WORDS_SHARE + WORDS_SHARE:
            chosen = draw.choice(len(words), size=min(len(words), 3), replace=False)
            joined = ", ".join(words[int(i)] for i in chosen)
            if kind < LABEL_AND_WORDS_SHARE:
                return f"{row['style']} {row['caption']}, {joined}"
            return f"{row['style']} {joined}"
        return f"{row['style']} {row['caption']}"
