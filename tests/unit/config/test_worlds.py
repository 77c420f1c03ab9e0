"""Embedded names: what they stand for, and what is said of a wrong one."""

from __future__ import annotations

import pytest

from diffexpo.config.worlds import WORLDS, world_of
from diffexpo.worlds import asset_path, embedded_prompts, missing_assets


def test_a_name_says_its_world() -> None:
    assert world_of("scenes:diffusion") == "scenes" and world_of("emoji:train") == "emoji"
    assert world_of("scenes") is None and world_of("prompts:first_tries") is None and world_of("a/b") is None


def test_everything_that_a_world_names_is_there() -> None:
    assert missing_assets() == []


@pytest.mark.parametrize("world", WORLDS)
def test_a_wrong_name_is_answered_with_the_right_ones(world: str) -> None:
    with pytest.raises(
        KeyError, match=f"{world} asset 'trian' is unknown.*diffusion.*lists of prompts train"
    ):
        asset_path(world, "trian")
    assert embedded_prompts(f"{world}:trian") is None
    assert len(embedded_prompts(f"{world}:train") or []) > 100
