"""The rules of benchmark tables: HPSv2's parts, GenEval's tasks, and how often their intervals hold the truth."""

import math

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation.totals import chunk_means, in_order, mean_of_categories, total


def published_rule(values):
    """The lines of HPSv2's evaluation.py."""
    averages = [np.mean(values[i : i + 80]) for i in range(0, 800, 80)]
    return np.mean(averages), np.std(averages)


def test_hps_aggregation_is_the_published_one_on_3200_scores():
    scores = np.random.default_rng(0).normal(27.0, 2.0, (4, 800))
    for style in scores:
        assert chunk_means(style) == pytest.approx(published_rule(style.tolist()), abs=1e-12)
    categories = [name for name in "abcd" for _ in range(800)]
    ids = [str(number) for number in range(3200)]
    mean, low, high = total("chunks", scores.ravel(), categories, ids, resamples=200, seed=0)
    assert mean == pytest.approx(scores.mean(), abs=1e-12)
    assert low < mean < high


def test_order_matters_to_the_spread_alone():
    scores = np.arange(100.0)
    mean, spread = chunk_means(scores)
    assert (mean, spread) == pytest.approx((49.5, 10 * np.std(np.arange(10))))
    turned = chunk_means(scores.reshape(10, 10).T.ravel())
    assert turned[0] == pytest.approx(mean)
    assert turned[1] == pytest.approx(np.std(np.arange(10)))


def test_parts_of_unequal_length_and_scores_that_are_missing():
    assert chunk_means([1.0, 2.0, math.nan]) == (1.5, pytest.approx(math.nan, nan_ok=True))
    values = np.arange(20.0)
    values[0] = math.nan
    assert chunk_means(values)[0] == pytest.approx(np.mean([1.0, *(2.0 * k + 0.5 for k in range(1, 10))]))
    with pytest.raises(DataError, match="no finite value"):
        chunk_means([math.nan])


def test_tasks_weigh_alike_and_images_of_a_task_do_too():
    values = [1, 0, 0, 1, math.nan]
    mean, low, high = mean_of_categories(values, ["a", "b", "b", "b", "b"], [0, 1, 1, 2, 3], resamples=500)
    assert mean == pytest.approx((1 + 1 / 3) / 2)
    assert low <= mean <= high
    with pytest.raises(DataError, match="no finite value"):
        mean_of_categories([math.nan], ["a"], [0])
    assert mean_of_categories([0.25], ["a"], [0]) == (
        0.25,
        pytest.approx(math.nan, nan_ok=True),
        pytest.approx(math.nan, nan_ok=True),
    )


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator, truth, hits = np.random.default_rng(1), (0.2, 0.5, 0.9), 0
    categories = [name for name in "abc" for _ in range(120)]
    ids = [number // 2 for number in range(360)]
    for seed in range(800):
        rates = np.concatenate([np.repeat(generator.beta(8 * p, 8 * (1 - p), 60), 2) for p in truth])
        right = generator.random(360) < rates
        _, low, high = mean_of_categories(right, categories, ids, resamples=300, seed=seed)
        hits += low <= np.mean(truth) <= high
    assert 0.93 <= hits / 800 <= 0.97


def test_categories_come_in_the_suites_order():
    assert in_order(["b", "c", "a", "b"], {"z": 1, "c": 2}) == ["c", "a", "b"]
