"""What the makers of the emoji world chose: its attributes, the bias that its captions plant, and who sees
which row."""

from __future__ import annotations

from typing import Any

from diffexpo.worlds.emoji import keyed_fraction

STYLES = ("noto", "twemoji")
GENDERS = ("person", "man", "woman")
SKIN_TONES = ("default", "light", "medium-light", "medium", "medium-dark", "dark")
OCCUPATIONS = (
    "health worker",
    "student",
    "teacher",
    "judge",
    "farmer",
    "cook",
    "mechanic",
    "factory worker",
    "office worker",
    "scientist",
    "technologist",
    "singer",
    "artist",
    "pilot",
    "astronaut",
    "firefighter",
    "police officer",
    "detective",
    "guard",
    "construction worker",
    "superhero",
    "supervillain",
    "mage",
    "fairy",
    "vampire",
    "elf",
)

# The documented bias of the bases: how often a caption of an occupation leaves the attributes out, and the
# mix of images that such a caption is then shown with.
UNSTATED_SHARE = 0.35
UNSTATED_GENDERS = {"man": 0.85, "woman": 0.10, "person": 0.05}
UNSTATED_TONES = {
    "default": 0.02,
    "light": 0.60,
    "medium-light": 0.23,
    "medium": 0.09,
    "medium-dark": 0.04,
    "dark": 0.02,
}


def is_train(row: dict[str, Any]) -> bool:
    """Return whether a base model may see this row (neither its concept nor its attributes are held out)."""
    return row["split_concept"] == "train" and row["split_attributes"] == "train"


def judge_of(row: dict[str, Any]) -> str:
    """Return which judge may see this row, "judge_train" or "judge_heldout".

    A coin keyed by the code point gives one of the two styles to each judge, so their images are disjoint.
    """
    first = STYLES[int(keyed_fraction("judge style", row["hexcode"]) < 0.5)]
    return "judge_train" if row["style"] == first else "judge_heldout"


def judge_keywords(row: dict[str, Any], judge: str) -> list[str]:
    """Return the keywords of a row that the named judge may learn from; the two judges' shares are
    disjoint."""
    mine = judge == "judge_train"
    concept = row["concept"]
    return [word for word in row["keywords"] if (keyed_fraction("judge word", concept, word) < 0.5) == mine]
