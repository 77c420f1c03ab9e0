"""Comparing models by their scores: paired differences and win rates with intervals, many of them at once.

Images of one prompt are alike, and so are images of one training seed (or votes of one rater). An interval
over one kind of cluster is the bootstrap of `metrics`; over two kinds crossed it is a t interval whose
variance counts both:

    theta - theta* ~ sum_i u_i,    V = V_1 + V_2 - V_12
    V_k = G_k / (G_k - 1) sum_{g in k} (sum_{i in g} u_i)^2

with u_i the influence of row i on the estimate, G_k the number of clusters of kind k, and V_12 over the cells
that both kinds form. Source: Cameron, Gelbach and Miller, "Robust inference with multiway clustering" (2011),
equation 2.13 and the small-sample factor below it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bootstrap_mean, number_labels, win_rate

Estimate = tuple[float, float, float]
ImageKey = tuple[int, str, int]
"""Names the noise of an image: (seed of the run, id of the prompt, number of the image)."""
Scores = Mapping[ImageKey, float]
Name = TypeVar("Name", bound=Hashable)
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """How a model, `first`, does against another on the images that both have: same prompt, same noise.

    `difference` is the mean score of the first less that of the second, `rate` the share of images on which
    it scores higher, ties counting one half; both with 95% intervals, over prompts and, where there are
    several seeds, over seeds too. `p_value` is two-sided: the exact sign test over prompts, or the t test of
    the rate with several seeds. `p_holm` is that of `compare_models`, corrected for all of its comparisons.
    """

    first: str
    second: str
    difference: Estimate
    rate: Estimate
    wins: int
    ties: int
    losses: int
    num_prompts: int
    num_seeds: int
    p_value: float
    p_holm: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the whole interval of the rate is on one side of one half and the
        corrected p-value is below 5%; else `undecided`."""
        _, low, high = self.rate
        if self.p_holm < LEVEL and low > 0.5:
            return "better"
        return "worse" if self.p_holm < LEVEL and high < 0.5 else "undecided"


def clustered_error(influence: ArrayLike, *kinds: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of estimates whose rows form clusters of one kind, or of two kinds crossed.

    Args:
        influence: u (N, d): how far row i moves each of d estimates.
        kinds: One or two sequences of N cluster labels.
    Returns:
        (errors (d,), degrees of freedom (d,)). With two kinds V is at least that of each kind alone, since
        the difference V_1 + V_2 - V_12 may come out too small by chance; the degrees of freedom are
        Satterthwaite's, V^2 / (V_1^2 / (G_1 - 1) + V_2^2 / (G_2 - 1)). In simulation t intervals cover the
        truth in 93 to 97% of cases with three clusters or more of either kind, in up to 99% where one kind
        makes no difference, and in 90 to 98% with two clusters. With a single cluster of a kind nothing is
        known of its spread: errors are NaN. Influences (-1/2, 1/2) in two clusters give 1.
    Raises:
        DataError: no row, or not one label a row.
    """
    rows = np.asarray(influence, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise DataError(f"clustered_error: influence of shape {rows.shape}; expected (N, d) with N > 0")
    labels = [number_labels(kind, len(rows)) for kind in kinds]
    found = [_variance(rows, label) for label in labels]
    if min(groups for _, groups in found) < 2:
        return np.full(rows.shape[1], math.nan), np.zeros(rows.shape[1])
    if len(found) == 1:
        variance, groups = found[0]
        return np.sqrt(variance), np.full(rows.shape[1], groups - 1.0)
    (one, num_one), (two, num_two) = found
    both, _ = _variance(rows, number_labels(list(zip(*labels, strict=True)), len(rows)))
    variance = np.maximum(one + two - both, np.maximum(one, two))
    spread = one**2 / (num_one - 1) + two**2 / (num_two - 1)
    # Where nothing varies there is nothing to estimate, and any number of degrees will do.
    degrees = np.divide(variance**2, spread, out=np.full_like(spread, 1.0), where=spread > 0)
    return np.sqrt(variance), degrees


def t_quantile(degrees: ArrayLike, share: float = 1 - LEVEL / 2) -> np.ndarray:
    """The share-quantile of Student's t with these degrees of freedom: t_quantile(9) = 2.262."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(degrees, share), dtype=np.float64)


def t_probability(statistic: float, degrees: float) -> float:
    """Two-sided p-value of Student's t: t_probability(2.262, 9) = 0.05."""
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(statistic)))


def crossed_mean(
    values: ArrayLike, first: Sequence[Hashable], second: Sequence[Hashable]
) -> tuple[Estimate, float]:
    """Mean over cells of their means, with its 95% interval over two kinds of clusters that cross.

    Args:
        values: Numbers (N,), finite.
        first, second: Labels (N,) of each kind, such as seed and prompt, or rater and prompt.
    Returns:
        ((mean, low, high), p-value of the mean being 0). With one cluster of a kind the ends are NaN. A
        constant c gives (c, c, c), with p-value 1 for 0 and 0 else.
    """
    numbers = np.asarray(values, dtype=np.float64)
    cells: dict[tuple[Hashable, Hashable], list[float]] = {}
    for key, value in zip(zip(first, second, strict=True), numbers, strict=True):
        cells.setdefault(key, []).append(float(value))
    means = np.array([np.mean(own) for own in cells.values()])
    mean = float(means.mean()) if len(means) else math.nan
    influence = ((means - mean) / max(len(means), 1))[:, None]
    errors, degrees = clustered_error(influence, [key[0] for key in cells], [key[1] for key in cells])
    error, degree = float(errors[0]), float(degrees[0])
    if math.isnan(error):
        return (mean, math.nan, math.nan), math.nan
    if error == 0.0:
        return (mean, mean, mean), float(mean == 0.0)
    reach = float(t_quantile(degree)) * error
    return (mean, mean - reach, mean + reach), t_probability(mean / error, degree)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: rejecting those below 5% errs anywhere in at most 5% of cases.

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    Those that are NaN (nothing was compared) stay NaN and do not count in m. holm([0.01, 0.04, 0.03]) is
    [0.03, 0.06, 0.06]. Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    found, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        found[place] = highest
    return found


def compare_models(
    models: Mapping[str, Scores],
    couples: Sequence[tuple[str, str]] | None = None,
    *,
    resamples: int = 10000,
    seed: int = 0,
) -> list[Comparison]:
    """Every couple of models on the images that both have, with p-values corrected for their number (Holm).

    Args:
        models: Scores of each model under one judge, by (seed, prompt, image); others than finite ones are
            left out.
        couples: (first, second) names; by default all, in order.
        resamples, seed: Of the bootstrap over prompts, with one seed.
    Returns:
        One Comparison a couple, in order; couples that share no image are left out.
    Raises:
        DataError: a couple names a model that is not there.
    """
    chosen = list(combinations(models, 2)) if couples is None else list(couples)
    unknown = {name for couple in chosen for name in couple} - models.keys()
    if unknown:
        raise DataError(
            f"compare_models: no scores of {', '.join(sorted(unknown))}; there are {list(models)}"
        )
    found = []
    for first, second in chosen:
        one = _compare(first, second, models[first], models[second], resamples, seed)
        found += [] if one is None else [one]
    corrected = holm([one.p_value for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def mean_score(scores: Scores, *, resamples: int = 10000, seed: int = 0) -> Estimate | None:
    """Mean score with its 95% interval over prompts and, where there are several, seeds; None without one."""
    kept = {key: value for key, value in scores.items() if math.isfinite(value)}
    if not kept:
        return None
    return _interval(list(kept.values()), list(kept), resamples, seed)[0]


def frontier(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """The models that none beats at both, with no more KL and no less reward.

    Args:
        points: (KL to the base, reward) of each model.
    Returns:
        Their names by rising KL. frontier({"base": (0, 1), "a": (2, 3), "b": (3, 2)}) is ["base", "a"].
    """
    kept: list[Name] = []
    best = -math.inf
    for name, (_, reward) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if reward > best:
            kept.append(name)
            best = reward
    return kept


def _compare(
    first: str, second: str, left: Scores, right: Scores, resamples: int, seed: int
) -> Comparison | None:
    keys = [key for key in left if math.isfinite(left[key]) and math.isfinite(right.get(key, math.nan))]
    if not keys:
        return None
    one, other = np.array([left[key] for key in keys]), np.array([right[key] for key in keys])
    prompts, seeds = [key[1] for key in keys], {key[0] for key in keys}
    win = win_rate(one, other, prompts=prompts, resamples=resamples, seed=seed)
    difference, _ = _interval(list(one - other), keys, resamples, seed)
    rate, p_value = win.interval, win.p_value
    if len(seeds) > 1:
        half, p_value = _interval(list(0.5 * np.sign(one - other)), keys, resamples, seed)
        rate = (0.5 + half[0], max(0.0, 0.5 + half[1]), min(1.0, 0.5 + half[2]))
    return Comparison(
        first=first,
        second=second,
        difference=difference,
        rate=rate,
        wins=win.wins,
        ties=win.ties,
        losses=win.losses,
        num_prompts=win.num_prompts,
        num_seeds=len(seeds),
        p_value=p_value,
        p_holm=p_value,
    )


def _interval(
    values: Sequence[float], keys: Sequence[ImageKey], resamples: int, seed: int
) -> tuple[Estimate, float]:
    """Mean with its interval over prompts, and over seeds where there are several; then a p-value too."""
    seeds, prompts = [key[0] for key in keys], [key[1] for key in keys]
    if len(set(seeds)) > 1:
        return crossed_mean(values, seeds, prompts)
    return bootstrap_mean(values, prompts, resamples=resamples, seed=seed), math.nan


def _variance(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """V_k (d,) of one kind of clusters, and their number."""
    groups = int(labels.max()) + 1
    sums = np.zeros((groups, rows.shape[1]))
    np.add.at(sums, labels, rows)
    return (sums**2).sum(axis=0) * groups / max(groups - 1, 1), groups
