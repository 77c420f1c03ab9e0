"""Truths about the comparison numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation import best_of_n_kl, bootstrap_mean, bradley_terry, sign_test, vendi_score, win_rate
from diffexpo.rng import numpy_generator


def test_winning_everywhere_is_one_with_an_honest_interval() -> None:
    result = win_rate([2.0] * 20, [1.0] * 20, resamples=200)
    assert result.rate == 1.0 and result.high == 1.0
    assert result.low == pytest.approx(0.025 ** (1 / 20))
    assert (result.wins, result.ties, result.losses) == (20, 0, 0)
    assert result.verdict == "better"
    assert result.p_value == pytest.approx(2 / 2**20)
    lost = win_rate([1.0] * 20, [2.0] * 20, resamples=200)
    assert (lost.low, lost.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert lost.verdict == "worse"


def test_swapping_gives_the_complement_and_mirrors_the_interval() -> None:
    draw = numpy_generator(1, "swap")
    a, b = draw.integers(0, 4, 60), draw.integers(0, 4, 60)
    prompts = [f"p{i // 3}" for i in range(60)]
    one, two = (
        win_rate(a, b, prompts=prompts, resamples=2000),
        win_rate(b, a, prompts=prompts, resamples=2000),
    )
    assert one.rate + two.rate == pytest.approx(1.0, abs=1e-12)
    assert (one.low, one.high) == pytest.approx((1 - two.high, 1 - two.low), abs=1e-12)
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)
    assert one.p_value == two.p_value


def test_ties_count_one_half() -> None:
    same = win_rate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], resamples=50)
    assert (same.rate, same.low, same.high, same.ties, same.p_value) == (0.5, 0.5, 0.5, 3, 1.0)
    assert same.verdict == "undecided"
    assert win_rate([1.0, 1.0], [1.0, 0.0], resamples=50).rate == 0.75


def test_prompts_count_the_same_however_many_images_they_have() -> None:
    a, b = [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]
    assert win_rate(a, b, prompts=["x"] * 4 + ["y"], resamples=50).rate == 0.5
    assert win_rate(a, b, resamples=50).rate == 0.8


def test_duplicated_prompts_widen_the_interval_as_they_must() -> None:
    draw = numpy_generator(2, "duplicates")
    a = np.repeat(draw.normal(0.2, 1.0, 40), 8)
    b = np.zeros(320)
    prompts = [i // 8 for i in range(320)]
    clustered, naive = win_rate(a, b, prompts=prompts, resamples=4000), win_rate(a, b, resamples=4000)
    assert clustered.rate == pytest.approx(naive.rate)
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.15)


def test_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    draw = numpy_generator(3, "coverage")
    prompts = [i // 2 for i in range(160)]
    covered = 0
    for trial in range(300):
        chance = np.repeat(draw.beta(3, 2, 80), 2)
        a = (draw.random(160) < chance).astype(float)
        result = win_rate(a, np.full(160, 0.5), prompts=prompts, resamples=400, seed=trial)
        covered += result.low <= 0.6 <= result.high
    assert 0.91 <= covered / 300 <= 0.985


def test_scores_that_failed_are_left_out_and_counted() -> None:
    result = win_rate([1.0, math.nan, 3.0], [0.0, 0.0, math.inf], resamples=50)
    assert (result.num, result.dropped, result.rate) == (1, 2, 1.0)
    with pytest.raises(DataError, match="no row has a finite score"):
        win_rate([math.nan], [1.0])
    with pytest.raises(DataError, match="3 scores and b has 2"):
        win_rate([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match="prompt labels"):
        win_rate([1, 2], [1, 2], prompts=["x"])


def test_sign_test_equals_the_binomial_by_hand() -> None:
    assert sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(7, 3) == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0


def test_bootstrap_mean_agrees_with_the_normal_interval_and_is_reproducible() -> None:
    values = numpy_generator(4, "mean").normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_mean(values, resamples=4000)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)
    assert bootstrap_mean(values, resamples=4000) == (mean, low, high)
    assert bootstrap_mean([5.0, 5.0], resamples=10) == (5.0, 5.0, 5.0)
    with pytest.raises(DataError):
        bootstrap_mean([math.nan])


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0, math.inf])
def test_vendi_counts_equal_and_orthogonal_items(q: float) -> None:
    assert vendi_score(np.ones((5, 3)), q) == pytest.approx(1.0)
    assert vendi_score(7.0 * np.eye(6), q) == pytest.approx(6.0)
    assert vendi_score(np.repeat(np.eye(3), 4, axis=0), q) == pytest.approx(3.0)


def test_vendi_orders_and_both_spectra_agree_with_the_definition() -> None:
    rows = numpy_generator(5, "vendi").normal(size=(12, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    spectrum = np.linalg.eigvalsh(unit @ unit.T / 12)
    spectrum = spectrum[spectrum > 1e-12]
    assert vendi_score(rows) == pytest.approx(np.exp(-(spectrum * np.log(spectrum)).sum()))
    assert vendi_score(rows, 2.0) == pytest.approx(1 / (spectrum**2).sum())
    assert vendi_score(rows, math.inf) == pytest.approx(1 / spectrum.max())
    assert vendi_score(rows, 0.5) > vendi_score(rows) > vendi_score(rows, 2.0) > vendi_score(rows, math.inf)
    padded = np.concatenate([rows, np.zeros((12, 40))], axis=1)
    assert vendi_score(padded) == pytest.approx(vendi_score(rows))


def test_vendi_refuses_what_has_no_angle() -> None:
    with pytest.raises(DataError, match="all zeros"):
        vendi_score([[0.0, 0.0], [1.0, 0.0]])
    with pytest.raises(DataError, match="finite"):
        vendi_score([[math.nan, 1.0]])
    with pytest.raises(DataError, match="order"):
        vendi_score(np.eye(2), -1.0)


def test_bradley_terry_returns_the_strengths_that_made_the_table() -> None:
    strengths = np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    wins = 1000 * strengths[:, None] / (strengths[:, None] + strengths[None, :])
    assert bradley_terry(wins) == pytest.approx(strengths, rel=1e-6)
    assert bradley_terry([[0, 3], [1, 0]]) == pytest.approx([0.75, 0.25])
    assert bradley_terry([[0]]) == pytest.approx([1.0])


def test_bradley_terry_refuses_tables_without_a_finite_maximum() -> None:
    unbeaten = [[0, 5, 5], [0, 0, 3], [0, 2, 0]]
    with pytest.raises(DataError, match=r"player\(s\) \[0\]"):
        bradley_terry(unbeaten)
    two_islands = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    with pytest.raises(DataError, match="no finite strengths"):
        bradley_terry(two_islands)
    ranked = bradley_terry(unbeaten, prior=0.5)
    assert ranked[0] > ranked[1] > ranked[2]
    with pytest.raises(DataError, match="square"):
        bradley_terry([[0, 1, 2]])


def test_best_of_n_kl() -> None:
    assert best_of_n_kl([1, 4]) == pytest.approx([0.0, math.log(4) - 0.75])
