"""Comparisons of models against exact values, an independent library and known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bootstrap_mean, sign_test, win_rate
from diffexpo.evaluation.statistics import (
    clustered_error,
    compare_models,
    crossed_mean,
    frontier,
    holm,
    mean_score,
    t_probability,
    t_quantile,
)
from diffexpo.rng import numpy_generator

TRIALS = 600


def scores_of(values: np.ndarray, seeds: int = 1) -> dict[tuple[int, str, int], float]:
    """Scores by (seed, prompt, image) from values (seeds, prompts)."""
    table = values.reshape(seeds, -1)
    return {
        (seed, f"p{prompt}", 0): float(value)
        for seed, row in enumerate(table)
        for prompt, value in enumerate(row)
    }


def test_holm_equals_the_definition_and_keeps_what_was_not_compared() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    with_gap = holm([0.01, math.nan, 0.02])
    assert (
        with_gap[0] == pytest.approx(0.02) and math.isnan(with_gap[1]) and with_gap[2] == pytest.approx(0.02)
    )


def test_holm_errs_in_at_most_five_of_a_hundred_families() -> None:
    p_values = numpy_generator(1, "holm").random((4000, 10))
    rejected = sum(min(holm(list(row))) < 0.05 for row in p_values)
    assert 0.035 <= rejected / 4000 <= 0.06
    assert (p_values.min(axis=1) < 0.05).mean() > 0.35  # without it


def test_student_and_sign_test_agree_with_the_library() -> None:
    assert t_quantile([1, 9, 200]) == pytest.approx(stats.t.ppf(0.975, [1, 9, 200]))
    assert t_probability(-2.0, 7) == pytest.approx(2 * stats.t.sf(2.0, 7))
    for wins, losses in ((6, 0), (7, 3), (40, 61)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_the_bootstrap_has_the_width_of_students_interval() -> None:
    draw = numpy_generator(2, "width")
    for num in (8, 15, 40):
        values = draw.normal(size=num)
        _, low, high = bootstrap_mean(values, resamples=20000)
        student = stats.t.interval(0.95, num - 1, scale=values.std(ddof=1) / math.sqrt(num))
        assert high - low == pytest.approx(student[1] - student[0], rel=0.06)


@pytest.mark.parametrize(("prompts", "images"), [(12, 1), (25, 3), (80, 2)])
def test_intervals_of_means_over_prompts_cover_the_truth(prompts: int, images: int) -> None:
    draw = numpy_generator(3, "coverage", prompts)
    labels = np.repeat(np.arange(prompts), images)
    covered = 0
    for trial in range(TRIALS):
        values = (draw.normal(0, 1, (prompts, 1)) + draw.normal(0, 1, (prompts, images))).ravel()
        _, low, high = bootstrap_mean(values, labels, resamples=600, seed=trial)
        covered += low <= 0 <= high
    assert 0.93 <= covered / TRIALS <= 0.97


def test_intervals_of_win_rates_with_ties_cover_the_truth() -> None:
    draw = numpy_generator(4, "ties")
    labels, covered = np.repeat(np.arange(50), 2), 0
    for trial in range(TRIALS):
        chance = np.repeat(draw.beta(4, 3, 50), 2)
        outcome = np.where(draw.random(100) < 0.2, 0.0, np.where(draw.random(100) < chance, 1.0, -1.0))
        result = win_rate(outcome, np.zeros(100), prompts=labels, resamples=600, seed=trial)
        covered += result.low <= 0.1 + 0.8 * 4 / 7 <= result.high
    assert 0.93 <= covered / TRIALS <= 0.97


@pytest.mark.parametrize("effects", [(0.3, 0.0), (0.3, 0.5), (1.0, 0.3)])
def test_intervals_over_seeds_and_prompts_cover_the_truth(effects: tuple[float, float]) -> None:
    """Three seeds with effects of their own: an interval over prompts alone is too narrow, this one is not."""
    draw = numpy_generator(5, "crossed", *(round(10 * effect) for effect in effects))
    seeds, prompts = np.repeat(np.arange(3), 30).tolist(), np.tile(np.arange(30), 3).tolist()
    covered = plain = 0
    for _ in range(TRIALS):
        of_seed, of_prompt = draw.normal(0, effects[0], (3, 1)), draw.normal(0, effects[1], 30)
        values = (of_seed + of_prompt + draw.normal(size=(3, 30))).ravel()
        (mean, low, high), _ = crossed_mean(values, seeds, prompts)
        covered += low <= 0 <= high
        spread = values.reshape(3, 30).mean(axis=0).std(ddof=1) / math.sqrt(30)
        plain += abs(mean) <= 2.045 * spread
    assert 0.93 <= covered / TRIALS <= 0.97
    assert plain < 0.93 * TRIALS


def test_two_kinds_of_clusters_are_those_of_numpy() -> None:
    """A table of 4 seeds and 6 prompts, written down again: V_1 + V_2 - V_12 over its rows, columns and cells."""
    table = numpy_generator(8, "table").normal(0.4, 1.0, (4, 6)) + np.arange(4)[:, None]
    u = (table - table.mean()) / table.size
    one, two = 4 / 3 * (u.sum(axis=1) ** 2).sum(), 6 / 5 * (u.sum(axis=0) ** 2).sum()
    both = 24 / 23 * (u**2).sum()
    variance = max(one + two - both, one, two)
    degrees = variance**2 / (one**2 / 3 + two**2 / 5)
    expected = stats.t(degrees, loc=table.mean(), scale=math.sqrt(variance))
    seeds, prompts = np.repeat(np.arange(4), 6).tolist(), np.tile(np.arange(6), 4).tolist()
    # Each cell twice, half a unit above and below it: the mean is one over cells.
    values = np.concatenate([table.ravel() - 0.5, table.ravel() + 0.5])
    estimate, p_value = crossed_mean(values, seeds * 2, prompts * 2)
    assert estimate == pytest.approx((table.mean(), *expected.interval(0.95)), rel=1e-12)
    assert p_value == pytest.approx(
        2 * stats.t(degrees).sf(abs(table.mean()) / math.sqrt(variance)), rel=1e-9
    )


def test_one_kind_of_clusters_is_the_t_test_of_their_means() -> None:
    values = numpy_generator(6, "one").normal(0.3, 1.0, (20, 4))
    influence = ((values - values.mean()) / values.size).reshape(-1, 1)
    error, degrees = clustered_error(influence, np.repeat(np.arange(20), 4).tolist())
    assert error[0] == pytest.approx(values.mean(axis=1).std(ddof=1) / math.sqrt(20)) and degrees[0] == 19
    with pytest.raises(DataError, match="expected"):
        clustered_error(np.zeros((0, 1)), [])
    with pytest.raises(DataError, match="one label a row"):
        clustered_error(np.zeros((3, 1)), ["a", "b"])


def test_a_constant_has_no_width_and_one_seed_no_interval() -> None:
    assert crossed_mean([2.0] * 4, [0, 0, 1, 1], ["a", "b"] * 2) == ((2.0, 2.0, 2.0), 0.0)
    assert crossed_mean([0.0] * 4, [0, 0, 1, 1], ["a", "b"] * 2)[1] == 1.0
    (mean, low, high), p_value = crossed_mean([1.0, 2.0], [0, 0], ["a", "b"])
    assert mean == 1.5 and all(math.isnan(value) for value in (low, high, p_value))


def test_a_comparison_has_the_numbers_of_its_parts_and_mirrors() -> None:
    draw = numpy_generator(7, "pair")
    a, b = draw.normal(0.5, 1, 40), draw.normal(0, 1, 40)
    models = {"a": scores_of(a), "b": scores_of(b)}
    [one] = compare_models(models, resamples=500)
    win = win_rate(a, b, resamples=500)
    assert one.difference == bootstrap_mean(a - b, resamples=500)
    assert (one.rate, one.p_value, one.p_holm) == (win.interval, win.p_value, win.p_value)
    assert (one.wins, one.ties, one.losses, one.num_prompts, one.num_seeds) == (
        win.wins,
        0,
        win.losses,
        40,
        1,
    )
    [other] = compare_models(models, [("b", "a")], resamples=500)
    assert other.rate[0] == pytest.approx(1 - one.rate[0]) and other.difference[0] == -one.difference[0]
    assert (other.wins, other.losses) == (one.losses, one.wins)


def test_verdicts_of_many_comparisons_are_corrected() -> None:
    """Of 66 comparisons of twelve equal models some have p < 5%; none of them is called better."""
    draw = numpy_generator(8, "many")
    models = {f"m{number}": scores_of(draw.normal(size=60)) for number in range(12)}
    found = compare_models(models, resamples=200)
    assert len(found) == 66 and any(one.p_value < 0.05 for one in found)
    assert {one.verdict for one in found} == {"undecided"}
    models["best"] = scores_of(draw.normal(3.0, 1.0, 60))
    against = [(name, "best") for name in models if name != "best"]
    assert {one.verdict for one in compare_models(models, against, resamples=200)} == {"worse"}


def test_models_meet_on_the_images_that_both_have() -> None:
    models = {
        "a": {(0, "p", 0): 1.0, (0, "p", 1): math.nan, (0, "q", 0): 3.0, (1, "p", 0): 9.0},
        "b": {(0, "p", 0): 0.0, (0, "p", 1): 0.0, (0, "q", 0): 3.0},
        "c": {(7, "p", 0): 0.0},
    }
    [one] = compare_models(models, resamples=50)
    assert (one.first, one.second, one.wins, one.ties, one.num_prompts) == ("a", "b", 1, 1, 2)
    with pytest.raises(DataError, match="no scores of z"):
        compare_models(models, [("a", "z")])


def test_several_seeds_widen_a_comparison() -> None:
    draw = numpy_generator(9, "seeds")
    gains = draw.normal(0.0, 0.8, (3, 1)) + draw.normal(0, 1, (3, 80))
    models = {"a": scores_of(gains, 3), "b": scores_of(np.zeros((3, 80)), 3)}
    [one] = compare_models(models)
    assert one.num_seeds == 3 and one.num_prompts == 80
    assert 0 <= one.rate[1] < one.rate[0] < one.rate[2] <= 1
    _, low, high = bootstrap_mean(gains.ravel(), list(np.tile(np.arange(80), 3)))
    assert one.difference[2] - one.difference[1] > 2 * (high - low)
    assert mean_score(models["a"]) == one.difference
    assert mean_score({(0, "p", 0): math.nan}) is None


def test_frontier_keeps_what_nothing_beats() -> None:
    points = {"base": (0.0, 1.0), "a": (2.0, 3.0), "b": (3.0, 2.0), "c": (2.0, 2.5), "d": (9.0, 3.5)}
    assert frontier(points) == ["base", "a", "d"]
    for name, (kl, reward) in points.items():
        beaten = any(x <= kl and y >= reward and (x, y) != (kl, reward) for x, y in points.values())
        assert beaten is (name not in frontier(points))
