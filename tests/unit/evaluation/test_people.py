"""Numbers of a study against independent computations, published examples and known truths."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation.people import (
    agreement,
    compare,
    couples_of,
    detectable_rate,
    krippendorff_alpha,
    preference,
    two_way_interval,
)

NONE = math.nan
# Four observers, twelve units; Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]
UNITS = [[row[unit] for row in OBSERVERS if not math.isnan(row[unit])] for unit in range(12)]


def alpha_by_couples(units: list[list[float]], squared: bool) -> float:
    """The definition in exact fractions: disagreement within units against that of all answers that can be paired."""

    def gap(one: float, other: float) -> Fraction:
        return Fraction(one - other) ** 2 if squared else Fraction(int(one != other))

    pairable = [unit for unit in units if len(unit) > 1]
    total = sum(len(unit) for unit in pairable)
    observed = sum(
        (sum(gap(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in pairable),
        Fraction(0),
    )
    everything = [value for unit in pairable for value in unit]
    expected = sum(gap(a, b) for a, b in itertools.permutations(everything, 2))
    return float(1 - (observed / total) / (expected / Fraction(total * (total - 1))))


def test_alpha_of_the_published_example() -> None:
    assert krippendorff_alpha(UNITS) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, "interval") == pytest.approx(0.849, abs=5e-4)


@pytest.mark.parametrize("metric", ["nominal", "interval"])
def test_alpha_is_its_definition(metric: str) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        units = [list(generator.choice([0.0, 0.5, 1.0], size=generator.integers(0, 6))) for _ in range(15)]
        expected = alpha_by_couples(units, metric == "interval")
        assert krippendorff_alpha(units, metric) == pytest.approx(expected, abs=1e-9)  # type: ignore[arg-type]


def test_alpha_at_its_ends() -> None:
    assert krippendorff_alpha([[1, 1], [0, 0], [1, 1, 1]]) == 1.0
    assert krippendorff_alpha([[0, 1], [1, 0]]) < 0
    assert math.isnan(krippendorff_alpha([[1], [0]])) and math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    generator = np.random.default_rng(1)
    chance = [list(generator.integers(0, 2, 4)) for _ in range(4000)]
    assert abs(krippendorff_alpha(chance)) < 0.03


def test_the_interval_is_that_of_resampled_prompts_and_raters() -> None:
    """Against plain loops that draw prompts and raters with replacement."""
    generator = np.random.default_rng(2)
    prompts = [prompt for prompt in range(12) for _ in range(4)]
    raters = [int(generator.integers(0, 5)) for _ in prompts]
    values = [
        float(value) for value in generator.choice([0.0, 0.5, 1.0], size=len(prompts), p=[0.3, 0.1, 0.6])
    ]
    mean, low, high = two_way_interval(values, prompts, raters, resamples=20000, seed=3)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)
    means = []
    names = sorted(set(raters))
    for _ in range(4000):
        m, n = Counter(generator.integers(0, 12, 12)), Counter(generator.choice(names, len(names)))
        weights = [m[prompt] * n[rater] for prompt, rater in zip(prompts, raters, strict=True)]
        if sum(weights):
            means.append(np.average(values, weights=weights))
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)
    assert two_way_interval(values, prompts, raters, resamples=500, seed=1) == two_way_interval(
        values, prompts, raters, resamples=500, seed=1
    )


def test_the_interval_covers_the_truth_where_one_over_votes_does_not() -> None:
    """Prompts and raters have tastes of their own: an interval over single votes is too narrow, this one is not."""
    generator = np.random.default_rng(4)
    covered = plain = 0
    for trial in range(1000):
        of_prompt, of_rater = generator.normal(0, 0.2, 20), generator.normal(0, 0.2, 8)
        votes = [
            (
                prompt,
                rater,
                float(generator.random() < min(1, max(0, 0.5 + of_prompt[prompt] + of_rater[rater]))),
            )
            for prompt in range(20)
            for rater in range(8)
        ]
        prompts, raters, values = (list(column) for column in zip(*votes, strict=True))
        mean, low, high = two_way_interval(values, prompts, raters, resamples=400, seed=trial)
        covered += low <= 0.5 <= high
        plain += abs(mean - 0.5) <= 1.96 * 0.5 / math.sqrt(len(values))
    assert 930 <= covered <= 970 and plain < covered - 100


def test_the_interval_at_its_ends() -> None:
    assert two_way_interval([1.0] * 10, list(range(10)), ["x"] * 10) == (1.0, 0.025**0.1, 1.0)
    assert two_way_interval([0.0] * 10, list(range(10)), ["x"] * 10) == (0.0, 0.0, 1 - 0.025**0.1)
    assert two_way_interval([1.0, 0.0], [0, 1], ["x", "x"]) == (0.5, 0.0, 1.0)
    for wrong in (([], [], []), ([1.0], [1, 2], ["x"])):
        with pytest.raises(DataError, match="expected one prompt and one rater a vote"):
            two_way_interval(*wrong)


def row(
    a: str, b: str, answer: str, prompt: str = "p", rater: int = 1, question: str = "quality"
) -> dict[str, object]:
    return {"a": a, "b": b, "answer": answer, "prompt_id": prompt, "rater": rater, "question": question}


def test_votes_are_counted_for_the_first_model_whichever_side_it_was() -> None:
    rows = [
        row("x", "y", "a"),
        row("y", "x", "a", "q"),
        row("y", "x", "b", "r"),
        row("x", "y", "neither", "s"),
    ]
    rows += [row("x", "y", "skip"), row("x", "z", "a"), row("x", "y", "b", question="alignment")]
    quality, alignment = compare(rows, [("x", "y")], resamples=100, seed=0)
    assert (quality.wins, quality.ties, quality.losses, quality.votes) == (2, 1, 1, 4)
    assert quality.rate == pytest.approx(2.5 / 4, abs=1e-12) and (quality.prompts, quality.raters) == (4, 1)
    assert (alignment.question, alignment.rate) == ("alignment", 0.0)
    (turned,) = compare(rows[:5], [("y", "x")], resamples=100, seed=0)
    assert turned.rate == pytest.approx(1 - quality.rate, abs=1e-12)
    assert preference(row("x", "y", "a"), "y") == 0.0


def test_agreement_is_on_pairs_and_not_on_sides() -> None:
    rows = [
        row("x", "y", "a", "p", 1),
        row("y", "x", "b", "p", 2),
        row("x", "y", "b", "q", 1),
        row("y", "x", "a", "q", 2),
    ]
    assert agreement(rows, "quality") == (1.0, 2)
    assert math.isnan(agreement(rows[:1], "quality")[0])


def test_couples_of_models() -> None:
    assert couples_of(["a", "b", "c"], None) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert couples_of(["a", "b", "c"], "b") == [("a", "b"), ("c", "b")]


def test_the_rate_that_a_study_can_tell() -> None:
    assert detectable_rate(100, 1) == pytest.approx(0.5 + 0.5 * 2.801585 / 10, abs=1e-6)
    assert detectable_rate(100, 5, correlation=1.0) == pytest.approx(detectable_rate(100, 1))
    assert detectable_rate(100, 5, correlation=0.0) == pytest.approx(detectable_rate(500, 1))
    assert detectable_rate(1, 1) == 1.0
    # A sign test at that rate sees the difference in about four of five studies.
    generator, rate = np.random.default_rng(0), detectable_rate(200, 1)
    wins = generator.binomial(200, rate, 4000)
    assert (np.abs(wins - 100) > 1.959964 * math.sqrt(50)).mean() == pytest.approx(0.8, abs=0.04)
