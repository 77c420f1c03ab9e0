"""How many prompts a comparison needs, and what it can see: before anything is drawn.

A paired comparison of two models looks at one number of each prompt, the mean over its images of what the
first scores more than the second (or of 1 for a win, 1/2 for a tie, 0 for a loss). With m images a prompt
that number has the variance

    s^2 = between + within / m

and over P prompts the mean's standard error is s / sqrt(P).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import number_labels

_MANY = 2000


@dataclass(frozen=True)
class Spread:
    """Variance of a paired difference: `between` prompts (of their true means), `within` one (of images)."""

    between: float
    within: float

    def of_prompt(self, images: int) -> float:
        """Variance of a prompt's mean over `images` images."""
        return self.between + self.within / images


def measured_spread(values: ArrayLike, prompts: Sequence[Hashable]) -> Spread:
    """The spread of paired differences at hand, by analysis of variance.

        within = sum_p sum_{i in p} (d_i - d_p)^2 / (N - P)
        between = max(0, var_p(d_p) - within mean_p(1 / m_p))

    Args:
        values: Differences d (N,), finite; `prompts`: the prompt of each.
    Returns:
        A Spread. With one image a prompt the parts cannot be told apart: all is `within`, as if further
        images of a prompt were as different as other prompts, which promises too much of them.
    Raises:
        DataError: fewer than two prompts.
    """
    numbers = np.asarray(values, dtype=np.float64)
    labels = number_labels(prompts, len(numbers))
    counts = np.bincount(labels).astype(np.float64)
    if len(counts) < 2:
        raise DataError(f"measured_spread: {len(counts)} prompt; expected at least 2 to see how they differ")
    means = np.bincount(labels, weights=numbers) / counts
    total, extra = float(means.var(ddof=1)), len(numbers) - len(counts)
    if extra == 0:
        return Spread(0.0, total)
    within = float(((numbers - means[labels]) ** 2).sum() / extra)
    return Spread(max(0.0, total - within * float((1 / counts).mean())), within)


def win_spread(rate: float = 0.5, ties: float = 0.0, correlation: float = 0.0) -> Spread:
    """The spread of wins (1), ties (1/2) and losses (0) where nothing is drawn yet.

        variance = (1 - ties) / 4 - (rate - 1/2)^2,   of which `correlation` is between prompts

    Args:
        rate: Win rate, ties counting one half.
        ties: Share of ties, in [0, 1); with it the rate lies between ties / 2 and 1 - ties / 2.
        correlation: How alike outcomes of one prompt are, in [0, 1].
    Raises:
        DataError: numbers that no outcomes have.
    """
    if not (0 <= ties < 1 and ties / 2 <= rate <= 1 - ties / 2 and 0 <= correlation <= 1):
        shown = f"rate {rate:g}, ties {ties:g}, correlation {correlation:g}"
        raise DataError(f"win_spread: {shown}; expected ties / 2 <= rate <= 1 - ties / 2, all in [0, 1]")
    variance = (1 - ties) / 4 - (rate - 0.5) ** 2
    return Spread(correlation * variance, (1 - correlation) * variance)


def detectable_difference(
    num_prompts: int, spread: Spread, *, images: int = 1, power: float = 0.8, level: float = 0.05
) -> float:
    """The smallest true difference that a comparison of this size tells from none with the given power.

        delta = (z_{1 - level/2} + z_power) s / sqrt(P - z_{1 - level/2}^2 / 2)

    The subtrahend is what Student's t takes more than the normal distribution. 100 prompts with a variance of
    1/4 and one image each give 0.1414. inf for fewer prompts than can show anything.

    Source: Guenther, "Sample size formulas for normal theory t tests" (1981).
    """
    at_level, at_power = _quantiles(power, level)
    effective = num_prompts - at_level**2 / 2
    if effective <= 0:
        return math.inf
    return (at_level + at_power) * math.sqrt(spread.of_prompt(images) / effective)


def num_prompts_needed(
    difference: float, spread: Spread, *, images: int = 1, power: float = 0.8, level: float = 0.05
) -> int:
    """How many prompts show a true difference with the given power: the inverse of `detectable_difference`,
    rounded up; a win rate of 0.6 without ties is a difference of 0.1 and takes 191.

    Raises:
        DataError: the difference is 0 or not finite: no number of prompts shows it.
    """
    if not math.isfinite(difference) or difference == 0:
        raise DataError(f"num_prompts_needed: a difference of {difference:g}; expected a number other than 0")
    at_level, at_power = _quantiles(power, level)
    found = (at_level + at_power) ** 2 * spread.of_prompt(images) / difference**2 + at_level**2 / 2
    return max(2, math.ceil(found))


def sign_test_power(num_prompts: int, rate: float, *, ties: float = 0.0, level: float = 0.05) -> float:
    """How often the exact sign test finds the better one of two models.

        M ~ Binomial(P, 1 - ties) prompts are not tied, W ~ Binomial(M, (rate - ties / 2) / (1 - ties)) won;
        power = P[sign_test(W, M - W) < level, W > M / 2]

    Args:
        num_prompts: P, one outcome a prompt.
        rate: True win rate, ties counting one half.
        ties: Share of ties, in [0, 1).
    Returns:
        A probability; 191 prompts with a rate of 0.6 give 0.775, a little less than the 0.8 of an interval
        (`num_prompts_needed`): the exact test has few levels to choose from.
    Raises:
        DataError: numbers that no outcomes have.
    """
    from scipy.stats import binom

    win_spread(rate, ties)  # refuses what is no rate
    decided = np.arange(num_prompts + 1)
    losses = binom.ppf(level / 2, decided, 0.5)
    losses = np.where(2 * binom.cdf(losses, decided, 0.5) < level, losses, losses - 1)
    won = binom.sf(decided - losses - 1, decided, (rate - ties / 2) / (1 - ties))
    chances = binom.pmf(decided, num_prompts, 1 - ties)
    return float(np.sum(chances * np.where(losses >= 0, won, 0.0)))


def num_prompts_for_rate(rate: float, *, ties: float = 0.0, power: float = 0.8, level: float = 0.05) -> int:
    """How many prompts show a win rate by the exact sign test: 199 for 0.6, and for 0.4; 103 where half of
    them are tied. From 2,000 on it is as good as the interval, and `num_prompts_needed` counts.

    Raises:
        DataError: the rate is one half, which no number of prompts shows, or no rate with so many ties.
    """
    better = max(rate, 1 - rate)
    found = num_prompts_needed(better - 0.5, win_spread(better, ties), power=power, level=level)
    while found < _MANY and sign_test_power(found, better, ties=ties, level=level) < power:
        found += 1
    return found


def detectable_rate(
    num_prompts: int, *, ties: float = 0.0, power: float = 0.8, level: float = 0.05
) -> float | None:
    """The smallest win rate above one half that so many prompts show by the exact sign test; None where there
    is none. 200 prompts show 0.6016."""
    least, most = 0.5, 1 - ties / 2
    if sign_test_power(num_prompts, most, ties=ties, level=level) < power:
        return None
    while most - least > 1e-4:
        middle = (least + most) / 2
        if sign_test_power(num_prompts, middle, ties=ties, level=level) < power:
            least = middle
        else:
            most = middle
    return most


def _quantiles(power: float, level: float) -> tuple[float, float]:
    if not (0 < level < 1 and 0 < power < 1):
        raise DataError(f"power {power:g} at level {level:g}: expected numbers between 0 and 1")
    normal = NormalDist()
    return normal.inv_cdf(1 - level / 2), normal.inv_cdf(power)
