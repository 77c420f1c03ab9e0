"""What an evaluation could see before it is drawn, and what models that are judged already still need."""

import json

import numpy as np
import pytest

from diffexpo.evaluation.benchmark_plan import (
    BenchmarkPlan,
    measured_couples,
    minutes_left,
    needed_prompts,
    shared_level,
    visible_rates,
)
from diffexpo.evaluation.planning import Spread, detectable_rate, num_prompts_for_rate, num_prompts_needed
from tests.unit.evaluation.made_outcome import outcome

BASE, MINE = [0.0] * 6 + [1.0] * 2, [1.0] * 5 + [0.0] + [1.0] * 2
"""Of eight prompts five are won and three tied."""


@pytest.fixture
def two(tmp_path):
    looks = np.random.default_rng(0).normal(size=(2, 8)) + [[0.0], [0.5]]
    return outcome(
        tmp_path, {"base": {"right": BASE, "looks": looks[0]}, "mine": {"right": MINE, "looks": looks[1]}}
    )


def test_rates_are_those_of_the_sign_test_at_a_shared_level():
    level = shared_level(4)
    assert level == 0.0125 and shared_level(0) == 0.05
    few, many = visible_rates([3, 200], level)
    assert (few.rate, few.rate_half_tied) == (None, None)
    assert many.rate == detectable_rate(200, level=level) > many.rate_half_tied
    assert needed_prompts(level)[0.6] == num_prompts_for_rate(0.6, level=level) > num_prompts_for_rate(0.6)


def test_what_is_measured_counts_prompts_and_ties(two):
    [one] = measured_couples(two, "right", "base", 100, 0.05)
    assert (one.model, one.against, one.prompts, one.rate) == ("mine", "base", 8, 0.8125)
    assert one.rate_needs == num_prompts_for_rate(0.8125, ties=0.375)
    assert one.visible_rate == detectable_rate(100, ties=0.375)
    assert one.difference == 0.625
    [looks] = measured_couples(two, "looks", "base", 100, 0.05)
    gaps = two.model("mine").scores["looks"] - two.model("base").scores["looks"]
    spread = Spread(0.0, float(gaps.var(ddof=1)))
    assert looks.difference_needs == num_prompts_needed(float(gaps.mean()), spread)


def test_equal_models_and_trained_ones_need_nothing(tmp_path):
    scores = {label: {"right": BASE} for label in ("base", "twin", "own")}
    made = outcome(tmp_path, scores, trained=[("own", "right")])
    [twin] = measured_couples(made, "right", "base", 100, 0.05)
    assert (twin.model, twin.rate_needs, twin.difference_needs, twin.visible_rate) == (
        "twin",
        None,
        None,
        None,
    )


def test_a_plan_is_json(two):
    found = measured_couples(two, "right", "base", 100, 0.05)
    plan = BenchmarkPlan(
        "made",
        8,
        1,
        1,
        0.05,
        8,
        {"base": 0},
        {"base": None},
        visible_rates([50], 0.05),
        {0.6: 199},
        "right",
        found,
    )
    read = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert read["measured"][0]["rate"] == 0.8125 and read["needed"] == {"0.6": 199}
    assert read["visible"][0]["prompts"] == 50
    assert minutes_left(60, 30, 60.0) == 2.0
    assert minutes_left(60, 0, 0.0) is None
