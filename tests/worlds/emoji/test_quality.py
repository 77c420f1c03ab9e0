"""Intervals and retrieval as the quality page measures them."""

from __future__ import annotations

import torch

from worlds.emoji.quality import bootstrap, grid_prompts, retrieval


def test_intervals_hold_the_mean_and_certainty_has_no_width() -> None:
    assert bootstrap([1.0] * 8, list("abcdefgh")) == (1.0, 1.0, 1.0)
    mean, low, high = bootstrap([0.0, 1.0] * 20, [str(i) for i in range(40)])
    assert low < mean < high and mean == 0.5
    assert retrieval(torch.eye(60))[0] == 1.0
    assert len({prompt.id for prompt in grid_prompts()}) == 16
