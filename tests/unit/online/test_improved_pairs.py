"""Improved pairs: lineage, filter, what is dropped, and how far winners are from their losers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffexpo.data.rows import Sample
from diffexpo.online.improved_pairs import (
    couples,
    distance_warning,
    gain_metrics,
    make_improved_pairs,
    relative_distance,
)
from tests.rows import sample_row


def group(prompt: str, *scores: tuple[float, float]) -> list[Sample]:
    rows = []
    for index, (loser, winner) in enumerate(scores):
        name = f"{prompt}-{index}"
        rows.append(sample_row(name, prompt, "exploration", rewards={"judge": loser}))
        rows.append(
            sample_row(f"{name}-improved", prompt, "improver", improved_from=name, rewards={"judge": winner})
        )
    return rows


GROUPS = [group("cat", (0.1, 0.5), (0.4, 0.3)), group("dog", (0.2, 0.2))]
GOOD = np.zeros((2, 1, 1), np.float32)


def gaps(pairs):
    return np.array([winner.rewards["judge"] - loser.rewards["judge"] for winner, loser in pairs])


def test_every_improved_image_wins_against_what_it_was_made_from() -> None:
    paired = make_improved_pairs(GROUPS, lambda name: GOOD, iteration=2)
    pairs = paired.pairs
    assert [pair.loser_id for pair in pairs] == ["cat-0", "cat-1", "dog-0"]
    assert all(pair.winner_id == f"{pair.loser_id}-improved" for pair in pairs)
    assert [pair.pair_id for pair in pairs] == [
        "pair-0002-000000-00",
        "pair-0002-000000-01",
        "pair-0002-000001-00",
    ]
    assert {(pair.source, pair.judge, pair.winner_agent, pair.margin) for pair in pairs} == {
        ("improved", "improver", "improver", 0.0)
    }
    assert paired.metrics()["pairs/count"] == 3 and paired.metrics()["pairs/dropped_filter"] == 0


def test_the_filter_keeps_what_rewards_agree_with_and_counts_the_rest() -> None:
    paired = make_improved_pairs(GROUPS, lambda name: GOOD, iteration=1, score=gaps)
    pairs = paired.pairs
    assert [pair.loser_id for pair in pairs] == ["cat-0"] and pairs[0].margin == pytest.approx(0.4)
    metrics = paired.metrics()
    assert (metrics["pairs/dropped_filter"], metrics["pairs/filter_agrees"]) == (2, 1 / 3)
    assert "2 that the rewards did not agree with" in paired.describe()
    assert not make_improved_pairs(GROUPS, lambda name: GOOD, iteration=1, score=gaps, min_margin=0.5).pairs


def test_latents_or_scores_that_are_not_finite_never_become_a_pair() -> None:
    broken = {
        "cat-0-improved": np.full((2, 1, 1), np.nan, np.float32),
        "dog-0": np.full((2, 1, 1), np.inf, np.float32),
    }
    paired = make_improved_pairs(GROUPS, lambda name: broken.get(name, GOOD), iteration=1)
    pairs = paired.pairs
    assert [pair.loser_id for pair in pairs] == ["cat-1"] and paired.dropped_nan == 2
    failed = [group("cat", (0.1, float("nan")))]
    paired = make_improved_pairs(failed, lambda name: GOOD, iteration=1, score=gaps)
    pairs = paired.pairs
    assert not pairs and paired.dropped_nan == 1


def test_gains_by_hand() -> None:
    metrics = gain_metrics(couples(GROUPS))
    assert metrics["improve/reward/judge/gain"] == pytest.approx((0.4 - 0.1 + 0.0) / 3)
    assert metrics["improve/reward/judge/better"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert gain_metrics([]) == {}


def test_relative_distance_is_0_for_the_loser_itself_and_1_for_unrelated_images() -> None:
    losers = torch.randn(200, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = [f"prompt {index}" for index in range(200)]
    assert relative_distance(losers, losers, prompts) == (0.0, 0.0)
    other = torch.randn(200, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    distance, relative = relative_distance(other, losers, prompts)
    assert distance == pytest.approx(2.0, rel=0.05) and relative == pytest.approx(1.0, rel=0.05)
    half = relative_distance(losers + 0.5 * (other - losers), losers, prompts)[1]
    assert half == pytest.approx(relative / 4, rel=1e-6)
    assert np.isnan(relative_distance(other, losers, ["one"] * 200)[1])
    by_hand = relative_distance(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]), ["a", "b"])
    assert by_hand == (1.0, 0.25)


def test_both_collapses_are_named() -> None:
    assert "nearly their losers" in distance_warning(0.01)
    assert "little to do with" in distance_warning(1.2)
    assert distance_warning(0.4) is None and distance_warning(float("nan")) is None
