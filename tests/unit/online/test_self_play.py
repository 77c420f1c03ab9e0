"""Self-play pairs: every own image loses against a data image of its prompt."""

from __future__ import annotations

import pytest

from diffexpo.data.rows import Sample
from diffexpo.errors import DataError
from diffexpo.online.self_play import make_self_pairs
from tests.rows import sample_row

IMAGES = {"a cat": ["d0", "d1", "d2"], "a dog": ["d3"]}


def group(prompt: str, *names: str) -> list[Sample]:
    return [sample_row(name, prompt, "exploration") for name in names]


def test_each_own_image_loses_against_a_data_image_of_its_prompt() -> None:
    groups = [group("a cat", "x", "y"), group("a dog", "z")]
    paired = make_self_pairs(groups, IMAGES, iteration=2, seed=7)
    pairs = paired.pairs
    assert [pair.loser_id for pair in pairs] == ["x", "y", "z"]
    assert all(pair.winner_id in IMAGES[pair.prompt] for pair in pairs)
    assert len({pair.pair_id for pair in pairs}) == 3
    assert (len(pairs), paired.groups) == (3, 2)
    assert pairs == make_self_pairs(groups, IMAGES, iteration=2, seed=7).pairs


def test_every_data_image_is_used_in_the_end() -> None:
    chosen = {
        make_self_pairs([group("a cat", "x")], IMAGES, iteration=1, seed=seed).pairs[0].winner_id
        for seed in range(40)
    }
    assert chosen == set(IMAGES["a cat"])


def test_a_prompt_without_data_is_refused() -> None:
    with pytest.raises(DataError, match="'a fish' has no image"):
        make_self_pairs([group("a fish", "x")], IMAGES, iteration=1, seed=7)
