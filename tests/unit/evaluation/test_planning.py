"""Plans of comparisons: what they promise is what simulated comparisons do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bootstrap_mean, sign_test, win_rate
from diffexpo.evaluation.planning import (
    Spread,
    detectable_difference,
    detectable_rate,
    measured_spread,
    num_prompts_for_rate,
    num_prompts_needed,
    sign_test_power,
    win_spread,
)
from diffexpo.rng import numpy_generator

TRIALS = 500


@pytest.mark.parametrize(("difference", "images", "power"), [(0.9, 1, 0.8), (0.4, 2, 0.8), (0.35, 4, 0.9)])
def test_the_planned_number_of_prompts_gives_the_promised_power(
    difference: float, images: int, power: float
) -> None:
    spread = Spread(0.5, 1.0)
    prompts = num_prompts_needed(difference, spread, images=images, power=power)
    draw = numpy_generator(1, "power", prompts)
    labels, found = np.repeat(np.arange(prompts), images), 0
    for trial in range(TRIALS):
        own = difference + draw.normal(0, math.sqrt(0.5), (prompts, 1)) + draw.normal(size=(prompts, images))
        found += bootstrap_mean(own.ravel(), labels, resamples=500, seed=trial)[1] > 0
    assert found / TRIALS == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(("rate", "ties"), [(0.62, 0.0), (0.65, 0.3)])
def test_a_planned_win_rate_is_found_as_often_as_promised(rate: float, ties: float) -> None:
    prompts = num_prompts_needed(rate - 0.5, win_spread(rate, ties))
    draw = numpy_generator(2, "rates", prompts)
    chances, found = [rate - ties / 2, ties, 1 - rate - ties / 2], 0
    for trial in range(TRIALS):
        outcome = draw.choice([1.0, 0.0, -1.0], prompts, p=chances)
        found += win_rate(outcome, np.zeros(prompts), resamples=500, seed=trial).low > 0.5
    assert found / TRIALS == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("rate", "ties", "level"), [(0.6, 0.0, 0.05), (0.7, 0.0, 0.025), (0.61, 0.7, 0.025), (0.65, 0.3, 0.05)]
)
def test_the_sign_test_finds_a_planned_win_rate_as_often_as_promised(
    rate: float, ties: float, level: float
) -> None:
    prompts = num_prompts_for_rate(rate, ties=ties, level=level)
    draw = numpy_generator(4, "signs", prompts)
    counts = draw.multinomial(prompts, [rate - ties / 2, ties, 1 - rate - ties / 2], size=4 * TRIALS)
    found = np.mean([sign_test(int(won), int(lost)) < level for won, _, lost in counts])
    assert found == pytest.approx(0.8, abs=0.05)
    assert found == pytest.approx(sign_test_power(prompts, rate, ties=ties, level=level), abs=0.03)


def test_the_power_of_the_sign_test_is_that_of_all_outcomes() -> None:
    """Six prompts of rate 0.9: only six wins have a p-value below 5%, 2/64. With ties fewer are decided."""
    assert sign_test_power(6, 0.9) == pytest.approx(0.9**6)
    assert sign_test_power(5, 0.9) == 0.0
    assert sign_test_power(7, 0.75, ties=0.5) == pytest.approx(0.5**7 + 7 * 0.5**7)
    assert num_prompts_for_rate(0.4) == num_prompts_for_rate(0.6) == 199
    assert num_prompts_for_rate(0.51) == num_prompts_needed(0.01, win_spread(0.51)) > 2000


@pytest.mark.parametrize("ties", [0.0, 0.5])
def test_the_rate_that_can_be_seen_has_the_promised_power(ties: float) -> None:
    rates = [detectable_rate(prompts, ties=ties) for prompts in (50, 200, 1000)]
    assert rates == sorted(rates, reverse=True)
    for prompts, rate in zip((50, 200, 1000), rates, strict=True):
        assert sign_test_power(prompts, rate, ties=ties) == pytest.approx(0.8, abs=0.002)
    assert detectable_rate(5) is None


def test_what_can_be_seen_and_what_it_takes_are_inverse() -> None:
    spread = win_spread()
    assert detectable_difference(100, spread) == pytest.approx(0.1414, abs=5e-5)
    assert num_prompts_needed(0.1, win_spread(0.6)) == 191
    for prompts in (20, 100, 1000):
        smallest = detectable_difference(prompts, spread, images=2)
        assert num_prompts_needed(smallest * 1.0001, spread, images=2) == prompts
        assert num_prompts_needed(-smallest * 0.9999, spread, images=2) == prompts + 1
    assert detectable_difference(1, spread) == math.inf
    assert win_spread(0.5, 0.0, 1.0).of_prompt(8) == 0.25 and win_spread().of_prompt(4) == 0.0625


def test_a_measured_spread_has_its_two_parts() -> None:
    draw = numpy_generator(3, "anova")
    own = draw.normal(0, 2.0, (3000, 1)) + draw.normal(0, 1.0, (3000, 4))
    spread = measured_spread(own.ravel(), list(np.repeat(np.arange(3000), 4)))
    assert (spread.between, spread.within) == (pytest.approx(4.0, rel=0.1), pytest.approx(1.0, rel=0.1))
    assert spread.of_prompt(4) == pytest.approx(own.mean(axis=1).var(ddof=1))
    alone = measured_spread(own[:, 0], list(range(3000)))
    assert (alone.between, alone.within) == (0.0, pytest.approx(own[:, 0].var(ddof=1)))
    uneven = measured_spread(np.concatenate([own[0], own[1, :2], own[2, :1]]), [0] * 4 + [1] * 2 + [2])
    assert uneven.between >= 0 and uneven.within > 0


def test_plans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="other than 0"):
        num_prompts_needed(0.0, win_spread())
    with pytest.raises(DataError, match="power 1"):
        detectable_difference(10, win_spread(), power=1.0)
    with pytest.raises(DataError, match="rate 0.9, ties 0.4"):
        win_spread(0.9, 0.4)
    with pytest.raises(DataError, match="at least 2"):
        measured_spread([1.0, 2.0], ["p", "p"])
