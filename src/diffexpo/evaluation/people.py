r"""What people's votes say of models: win rates, agreement, power of a study.

Votes on one prompt are alike, and so are votes of one rater, so intervals resample both:

    rate* = sum_{p,r} m_p n_r S_{pr} / sum_{p,r} m_p n_r N_{pr}
    m ~ Multinomial(P; 1/P),  n ~ Multinomial(R; 1/R)

with S_{pr} the sum and N_{pr} the number of rater r's votes on prompt p (the pigeonhole bootstrap). It is
wide rather than narrow: its variance is at least that of the estimate. `statistics.crossed_mean`, which joins
seeds, is no substitute: with one rater it has no interval, and with two one that may leave [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from diffexpo.errors import DataError, MissingError
from diffexpo.rng import numpy_generator

PREFERENCE = {"a": 1.0, "b": 0.0, "tie": 0.5, "neither": 0.5}
# 97.5% and 80% points of the normal distribution: a two-sided test at 5% with a power of 80%.
_LEVEL, _POWER = 1.959964, 0.841621
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Comparison:
    """How often `first` beats `second` for a question: `rate`, `low`, `high` in [0, 1], ties counting one
    half."""

    question: str
    first: str
    second: str
    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    prompts: int
    raters: int

    @property
    def votes(self) -> int:
        """Votes behind it."""
        return self.wins + self.ties + self.losses


def two_way_interval(
    values: Sequence[float],
    prompts: Sequence[Hashable],
    raters: Sequence[Hashable],
    *,
    resamples: int = 10000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of values in [0, 1] with its 95% percentile bootstrap interval over prompts and raters.

    Args:
        values: Votes (N,), 1 for a win, 0.5 for a tie, 0 for a loss.
        prompts, raters: Prompt and rater of each vote (N,).
        resamples, seed: Number of resamples and their name.
    Returns:
        (mean, low, high). Where all votes are 1 (or 0) nothing varies: the exact binomial bound
        0.025**(1/P) of the P prompts replaces the inner end. One rater and two prompts of values 1 and 0
        give (0.5, 0, 1).
    Raises:
        DataError: there is no vote, or the numbers of values, prompts and raters differ.
    Source: Owen, "The pigeonhole bootstrap" (Annals of Applied Statistics, 2007).
    """
    votes = np.asarray(values, dtype=np.float64)
    if len(votes) == 0 or not len(votes) == len(prompts) == len(raters):
        told = f"{len(votes)} votes, {len(prompts)} prompts, {len(raters)} raters"
        raise DataError(f"two_way_interval: {told}; expected one prompt and one rater a vote, and a vote")
    rows, columns = _numbers(prompts), _numbers(raters)
    shape = int(rows.max()) + 1, int(columns.max()) + 1
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (rows, columns), votes)
    np.add.at(counts, (rows, columns), 1.0)
    mean = float(votes.mean())
    generator = numpy_generator(seed, "two-way", *shape)
    rates = []
    step = max(1, _CHUNK // (shape[0] + shape[1]))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        m = generator.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size).astype(np.float64)
        n = generator.multinomial(shape[1], np.full(shape[1], 1 / shape[1]), size).astype(np.float64)
        total = ((m @ counts) * n).sum(axis=1)
        # A resample without any vote says nothing.
        rates.append((((m @ sums) * n).sum(axis=1) / np.where(total > 0, total, np.nan))[total > 0])
    low, high = (float(bound) for bound in np.percentile(np.concatenate(rates), [2.5, 97.5]))
    if mean == 1.0:
        low = 0.025 ** (1.0 / shape[0])
    if mean == 0.0:
        high = 1.0 - 0.025 ** (1.0 / shape[0])
    return mean, low, high


def krippendorff_alpha(
    units: Sequence[Sequence[float]], metric: Literal["nominal", "interval"] = "nominal"
) -> float:
    """Agreement of raters beyond chance, whatever each of them has answered.

        alpha = 1 - D_o / D_e,   D_o = 1/n sum_u 1/(m_u - 1) sum_{i != j in u} d(v_i, v_j)
        D_e = 1 / (n (n - 1)) sum_{v, v'} n_v n_v' d(v, v')

    The number is that of the package `krippendorff`.

    Args:
        units: The answers to each question, as numbers; units with fewer than two answers say nothing.
        metric: d is 1 for different answers (nominal), or the squared difference (interval).
    Returns:
        1 for perfect agreement, 0 for that of chance, below 0 for less; nan where nothing can be compared
        or all answers are the same. Krippendorff's own example of four observers and twelve units gives
        0.743.
    Raises:
        MissingError: the package is not installed.
    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011).
    """
    kept = [list(map(float, unit)) for unit in units if len(unit) > 1]
    values = sorted({value for unit in kept for value in unit})
    if len(values) < 2:
        return math.nan
    try:
        import krippendorff
    except ModuleNotFoundError:
        raise MissingError(
            'agreement needs krippendorff, which is not installed: pip install "diffexpo[label]"'
        ) from None
    counts = np.array([[unit.count(value) for value in values] for unit in kept])
    alpha = krippendorff.alpha(
        value_counts=counts, value_domain=np.array(values), level_of_measurement=metric
    )
    return float(alpha)


def detectable_rate(prompts: int, votes: int, correlation: float = 0.3) -> float:
    """The smallest win rate that a comparison tells from one half, in four of five studies at the 5% level.

        1/2 + (1.96 + 0.84) * 1/2 / sqrt(n),    n = P v / (1 + (v - 1) rho)

    Args:
        prompts, votes: P prompts with v votes each.
        correlation: rho, how alike votes on one prompt are, in [0, 1].
    Returns:
        A rate in (0.5, 1]; 100 prompts with one vote each give 0.640.
    """
    effective = prompts * votes / (1 + (votes - 1) * correlation)
    return min(1.0, 0.5 + 0.5 * (_LEVEL + _POWER) / math.sqrt(effective))


def compare(
    rows: Sequence[Mapping[str, Any]], couples: Sequence[tuple[str, str]], *, resamples: int, seed: int
) -> list[Comparison]:
    """Every couple of models by every question, in order.

    Args:
        rows: Answers with `question`, `prompt_id`, `rater`, `a`, `b` and `answer` (a, b, tie, neither; others
            are left out).
        couples: (first, second) models.
    """
    found = []
    for question in dict.fromkeys(row["question"] for row in rows):
        for first, second in couples:
            own = [
                row
                for row in rows
                if row["question"] == question
                and {row["a"], row["b"]} == {first, second}
                and row["answer"] in PREFERENCE
            ]
            if not own:
                continue
            values = [preference(row, first) for row in own]
            prompts, raters = [row["prompt_id"] for row in own], [row["rater"] for row in own]
            rate, low, high = two_way_interval(values, prompts, raters, resamples=resamples, seed=seed)
            counts = (values.count(1.0), values.count(0.5), values.count(0.0))
            sizes = (len(set(prompts)), len(set(raters)))
            found.append(Comparison(question, first, second, rate, low, high, *counts, *sizes))
    return found


def preference(row: Mapping[str, Any], first: str) -> float:
    """1 where an answer prefers the model `first`, 0 where the other one, 0.5 for neither of them."""
    value = PREFERENCE[row["answer"]]
    return value if row["a"] == first else 1.0 - value


def agreement(rows: Sequence[Mapping[str, Any]], question: str) -> tuple[float, int]:
    """Krippendorff's alpha (nominal: first, second, or neither) of a question, and the number of pairs with
    two answers or more."""
    units: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["question"] == question and row["answer"] in PREFERENCE:
            first, second = sorted((row["a"], row["b"]))
            units.setdefault((row["prompt_id"], first, second), []).append(preference(row, first))
    several = [unit for unit in units.values() if len(unit) > 1]
    return krippendorff_alpha(several), len(several)


def couples_of(models: Sequence[str], against: str | None) -> list[tuple[str, str]]:
    """The couples of models that a study compares: each against one, or all."""
    if against is not None:
        return [(model, against) for model in models if model != against]
    return list(combinations(models, 2))


def _numbers(names: Sequence[Hashable]) -> np.ndarray:
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(name, len(order)) for name in names], dtype=np.int64)
