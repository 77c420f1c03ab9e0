"""Mixing rewards: exact small cases, invariances, NaN and constants, conflict and agreement."""

from __future__ import annotations

import numpy as np
import pytest

from diffexpo.errors import RewardError
from diffexpo.rewards.mixture import (
    conflict_metrics,
    conflicts,
    disagreements,
    dominance,
    mix_rewards,
    uncertainty,
)

rng = np.random.default_rng(0)
A, B = rng.normal(size=(6, 8)), rng.normal(size=(6, 8))
EQUAL = {"a": 1.0, "b": 1.0}


def test_zscores_are_exact_on_two_candidates() -> None:
    mixed = mix_rewards({"a": np.array([[0.0, 1.0]]), "b": np.array([[5.0, 9.0]])}, EQUAL, "zscore")
    np.testing.assert_allclose(mixed, [[-2.0, 2.0]])


def test_zscore_equals_the_definition() -> None:
    expected = 2.0 * (A - A.mean(1, keepdims=True)) / A.std(1, keepdims=True)
    expected -= 0.5 * (B - B.mean(1, keepdims=True)) / B.std(1, keepdims=True)
    np.testing.assert_allclose(mix_rewards({"a": A, "b": B}, {"a": 2.0, "b": -0.5}, "zscore"), expected)


@pytest.mark.parametrize("kind", ["zscore", "rank", "pareto"])
def test_units_of_a_reward_do_not_matter(kind: str) -> None:
    shift = rng.normal(size=(6, 1)) * 100
    first = mix_rewards({"a": A, "b": B}, EQUAL, kind)
    second = mix_rewards({"a": 1000 * A + shift, "b": B / 7}, EQUAL, kind)
    np.testing.assert_allclose(first, second, atol=1e-8)


def test_ranks_average_ties_and_reverse_with_the_weight() -> None:
    scores = {"a": np.array([[3.0, 1.0, 1.0, 0.0]]), "b": np.array([[0.0, 1.0, 2.0, 3.0]])}
    np.testing.assert_allclose(mix_rewards(scores, EQUAL, "rank"), [[1.0, 5 / 6, 7 / 6, 1.0]])
    np.testing.assert_allclose(
        mix_rewards(scores, {"a": 1.0, "b": -1.0}, "rank"), [[1.0, 1 / 6, -1 / 6, -1.0]], atol=1e-12
    )


def test_global_zscores_standardise_over_all_prompts() -> None:
    expected = 2.0 * (A - A.mean()) / A.std() - 0.5 * (B - B.mean()) / B.std()
    np.testing.assert_allclose(mix_rewards({"a": A, "b": B}, {"a": 2.0, "b": -0.5}, "global"), expected)
    units = mix_rewards({"a": 7 * A + 3, "b": B / 9}, {"a": 2.0, "b": -0.5}, "global")
    np.testing.assert_allclose(units, expected, atol=1e-10)


def test_global_zscores_keep_a_prompt_that_says_little_small() -> None:
    # Under a the first prompt's candidates are nearly alike: within the prompt that is blown up to a whole vote, globally not.
    scores = {"a": np.array([[0.0, 1e-3], [0.0, 10.0]]), "b": np.array([[1.0, 0.0], [0.0, 1.0]])}
    weights = {"a": 2.0, "b": 1.0}
    within, globally = (mix_rewards(scores, weights, kind) for kind in ("zscore", "global"))
    assert within[0].argmax() == 1 and globally[0].argmax() == 0
    assert within[1].argmax() == globally[1].argmax() == 1


def test_global_zscores_leave_failures_out() -> None:
    a, b = A.copy(), B.copy()
    a[0, 2], b[3, 5] = np.nan, np.inf
    mixed = mix_rewards({"a": a, "b": b}, EQUAL, "global")
    good = np.ones_like(A, dtype=bool)
    good[0, 2] = good[3, 5] = False
    expected = sum((x - x[good].mean()) / x[good].std() for x in (A, B))
    np.testing.assert_allclose(mixed[good], expected[good])
    assert np.isnan(mixed[~good]).all()


@pytest.mark.parametrize("kind", ["zscore", "global", "rank", "pareto"])
def test_one_reward_keeps_its_own_units(kind: str) -> None:
    np.testing.assert_array_equal(mix_rewards({"a": A}, {"a": 3.0}, kind), A)
    np.testing.assert_array_equal(mix_rewards({"a": A}, {"a": -3.0}, kind), -A)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_candidate_without_a_score_is_out_and_does_not_move_the_others(kind: str) -> None:
    a, b = A.copy(), B.copy()
    a[0, 2], b[0, 5], b[1, 0] = np.nan, np.inf, -np.inf
    mixed = mix_rewards({"a": a, "b": b}, EQUAL, kind)
    assert np.isnan(mixed[0, [2, 5]]).all() and np.isnan(mixed[1, 0]) and np.isnan(mixed).sum() == 3
    kept = [0, 1, 3, 4, 6, 7]
    alone = mix_rewards({"a": A[:1, kept], "b": B[:1, kept]}, EQUAL, kind)
    np.testing.assert_allclose(mixed[:1, kept], alone)


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_groups_that_decide_nothing_stay_finite(kind: str) -> None:
    nothing = np.full((1, 4), np.nan)
    assert np.isnan(mix_rewards({"a": nothing, "b": nothing}, EQUAL, kind)).all()
    constant = np.full((1, 4), 0.1) * 3
    mixed = mix_rewards({"a": constant, "b": B[:1, :4]}, EQUAL, kind)
    order = np.argsort(B[0, :4])
    assert (np.diff(mixed[0, order]) > 0).all()
    flat = mix_rewards({"a": constant, "b": constant}, EQUAL, kind)
    assert np.ptp(flat) == 0 and np.isfinite(flat).all()


def test_rounding_noise_is_not_blown_up() -> None:
    noise = 1.0 + 1e-12 * np.array([[1.0, -1.0, 1.0, -1.0]])
    signal = np.array([[0.0, 1.0, 2.0, 3.0]])
    mixed = mix_rewards({"a": noise, "b": signal}, EQUAL, "zscore")
    expected = mix_rewards({"b": signal, "c": signal}, {"b": 0.5, "c": 0.5}, "zscore")
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_pareto_needs_every_reward() -> None:
    scores = {"a": np.array([[1.0, 2.0, 3.0, np.nan]]), "b": np.array([[1.0, 2.0, 0.0, 5.0]])}
    expected = np.zeros((1, 4, 4), dtype=bool)
    expected[0, 1, 0] = True
    np.testing.assert_array_equal(dominance(scores, EQUAL), expected)
    expected = np.zeros((1, 4, 4), dtype=bool)
    expected[0, 2, 0] = expected[0, 2, 1] = True
    np.testing.assert_array_equal(dominance(scores, {"a": 1.0, "b": -1.0}), expected)


def test_dominance_is_a_strict_order_and_agrees_with_the_mixture() -> None:
    order = dominance({"a": A, "b": B}, EQUAL)
    assert not (order & order.transpose(0, 2, 1)).any()
    mixed = mix_rewards({"a": A, "b": B}, EQUAL, "zscore")
    assert (mixed[:, :, None] > mixed[:, None, :])[order].all() and order.any()


def test_uncertainty_is_the_spread_of_zscores() -> None:
    np.testing.assert_allclose(uncertainty({"a": A, "b": 5 * A + 3}), 0, atol=1e-12)
    z = (A - A.mean(1, keepdims=True)) / A.std(1, keepdims=True)
    np.testing.assert_allclose(uncertainty({"a": A, "b": -A}), abs(z))
    with pytest.raises(RewardError, match="two or more rewards"):
        uncertainty({"a": A})


def test_conflicts_are_rank_correlations() -> None:
    found = conflicts({"a": A, "same": np.exp(A), "opposite": -(A**3), "flat": np.zeros_like(A)})
    assert found["a", "same"] == pytest.approx(1)
    assert found["a", "opposite"] == pytest.approx(-1)
    assert np.isnan(found["a", "flat"])
    half = {"a": np.array([[1.0, 2.0, 3.0]]), "b": np.array([[1.0, 3.0, 2.0]])}
    assert conflicts(half)["a", "b"] == pytest.approx(0.5)


def test_conflicts_follow_the_sign_of_the_weight_and_compare_where_both_have_scores() -> None:
    scores = {"a": A, "b": np.exp(A)}
    assert conflicts(scores, {"a": 1.0, "b": -2.0})["a", "b"] == pytest.approx(-1)
    holes = {"a": A, "b": np.exp(A), "c": np.full_like(A, np.nan)}
    found = conflicts(holes)
    assert found["a", "b"] == pytest.approx(1) and np.isnan(found["a", "c"])


def test_disagreement_is_the_share_of_couples_ordered_oppositely() -> None:
    scores = {"a": np.array([[1.0, 2.0, 3.0]]), "b": np.array([[1.0, 3.0, 2.0]])}
    assert disagreements(scores)["a", "b"] == pytest.approx(1 / 3)
    assert disagreements(scores, {"a": 1.0, "b": -1.0})["a", "b"] == pytest.approx(2 / 3)
    ties = {
        "a": np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]),
        "b": np.array([[0.0, 5.0, 5.0], [1.0, 2.0, 3.0]]),
    }
    assert disagreements(ties)["a", "b"] == 0.0
    assert np.isnan(disagreements({"a": A, "b": np.zeros_like(A)})["a", "b"])
    expected = np.mean(
        [(A[g, i] - A[g, j]) * (B[g, i] - B[g, j]) < 0 for g in range(6) for i in range(8) for j in range(i)]
    )
    assert disagreements({"a": A, "b": B})["a", "b"] == pytest.approx(expected)


def test_conflict_metrics_are_named_after_the_couple() -> None:
    found = conflict_metrics({"a": A, "b": -A, "watched": A}, {"a": 1.0, "b": -1.0})
    assert found["rollout/conflict/a:b/rank_correlation"] == pytest.approx(1)
    assert found["rollout/conflict/a:b/disagreement"] == 0.0
    assert found["rollout/conflict/a:watched/disagreement"] == 0.0
    assert len(found) == 6
    assert conflict_metrics({"a": A}, {"a": 1.0}) == conflict_metrics({}, {}) == {}
    assert conflict_metrics({"a": A, "b": np.full_like(A, np.nan)}, {"a": 1.0, "b": 1.0}) == {}


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(RewardError, match="no train reward"):
        mix_rewards({}, {}, "zscore")
    with pytest.raises(RewardError, match="same names"):
        mix_rewards({"a": A}, {"b": 1.0}, "zscore")
    with pytest.raises(RewardError, match="'a' has weight 0"):
        mix_rewards({"a": A, "b": B}, {"a": 0.0, "b": 1.0}, "zscore")
    with pytest.raises(RewardError, match="shapes"):
        mix_rewards({"a": A, "b": B[:3]}, EQUAL, "zscore")
