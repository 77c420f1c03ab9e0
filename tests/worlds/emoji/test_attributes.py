"""Who sees which row."""

from __future__ import annotations

from diffexpo.worlds import emoji
from worlds.emoji import attributes

ROWS = emoji.load_rows()


def test_judges_share_no_picture_and_no_word() -> None:
    owner: dict[str, set[tuple[str, str]]] = {}
    for row in ROWS:
        owner.setdefault(row["hexcode"], set()).add((row["style"], attributes.judge_of(row)))
        both = [set(attributes.judge_keywords(row, judge)) for judge in ("judge_train", "judge_heldout")]
        assert not both[0] & both[1] and both[0] | both[1] == set(row["keywords"])
    assert all({judge for _, judge in pairs} == {"judge_train", "judge_heldout"} for pairs in owner.values())
