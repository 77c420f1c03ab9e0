r"""What is drawn where a prompt leaves something open, corrected for the classifier's errors, with NumPy.

A classifier says value j of an image that shows value k with probability C_{kj}, measured on images whose
values are known. What it says of n images has shares q = C^T p, and p is the share of what they show:

    p_hat = argmax_p sum_j s_j log sum_k p_k C_{kj},    s_j = images of which it says j
    p_k <- p_k sum_j (s_j / n) C_{kj} / sum_l p_l C_{lj}          (expectation maximisation, from uniform)

Intervals draw q* ~ Dirichlet(s + 1/K) and C*_k ~ Dirichlet(counts_k + 1/K) (Perks' priors, for two values
Jeffreys'), so they hold the uncertainty of both the images and the classifier's error, and are never empty at
0 of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError
from diffexpo.rng import numpy_generator

ROUNDS = 200
"""Rounds of expectation maximisation; of a classifier that is right in most images far fewer change much."""
ENOUGH = 30
"""Labelled images of each value from which on a group of prompts has a table of its own."""
TRUSTED = 0.5
"""A classifier is a witness where of every value it recognises more than this share: C is then strictly
diagonally dominant, so q has one cause."""
Interval = tuple[float, float, float]
"""(estimate, low, high), with 95% between the ends."""


def corrected_shares(said: ArrayLike, confusion: ArrayLike) -> np.ndarray:
    """Shares of what images show, from what a classifier says of them (module's formula).

    Args:
        said: Images, or their share, of which each value is said, (..., K), >= 0, with a positive sum.
        confusion: C (..., K, K), rows by the true value, summing to 1.
    Returns:
        p (..., K), summing to 1. Where C is the identity p is said / sum; [60, 40] with rows [0.9, 0.1] and
        [0.2, 0.8] gives [4/7, 3/7].
    Raises:
        DataError: shapes that do not fit, negative numbers, nothing said, or rows that are no distribution.
    """
    counts, table = np.asarray(said, dtype=np.float64), np.asarray(confusion, dtype=np.float64)
    if counts.ndim < 1 or table.shape[-2:] != (counts.shape[-1],) * 2:
        raise DataError(
            f"corrected_shares: said {counts.shape}, confusion {table.shape}; expected K and K, K"
        )
    if (counts < 0).any() or (counts.sum(axis=-1) <= 0).any() or (table < 0).any():
        raise DataError("corrected_shares: expected counts >= 0, not all 0, and probabilities >= 0")
    if not np.allclose(table.sum(axis=-1), 1.0):
        raise DataError("corrected_shares: the rows of confusion do not sum to 1")
    q = counts / counts.sum(axis=-1, keepdims=True)
    p = np.full_like(np.broadcast_to(q, np.broadcast_shapes(q.shape, table.shape[:-1])), 1 / q.shape[-1])
    for _ in range(ROUNDS):
        expected = np.einsum("...k,...kj->...j", p, table)
        ratio = np.divide(q, expected, out=np.zeros_like(p), where=expected > 0)
        p = p * np.einsum("...j,...kj->...k", ratio, table)
        p = p / p.sum(axis=-1, keepdims=True)
    return p


def total_variation(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """1/2 sum_k |p_k - q_k| in [0, 1] over the last axis: the share that would have to change."""
    found: np.ndarray = 0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum(axis=-1)
    return found


def fair_distance(values: int, images: int) -> float:
    """The distance from uniform that so many images of a model without bias are expected to show.

    E[1/2 sum_k |n_k / n - 1/K|] with n_k ~ Binomial(n, 1/K), exact; 2 values and 2 images give 0.25.
    """
    share, total = 1.0 / values, 0.0
    for count in range(images + 1):
        weight = math.comb(images, count) * share**count * (1 - share) ** (images - count)
        total += weight * abs(count / images - share)
    return 0.5 * values * total


@dataclass(frozen=True)
class Calibration:
    """What a classifier says of images whose values are known: counts (K, K) by true value, then what it
    says; of single groups of prompts where they are known, and of all."""

    values: tuple[str, ...]
    counts: np.ndarray
    of_group: Mapping[str, np.ndarray]

    @property
    def recall(self) -> np.ndarray:
        """Share of each value's images that it recognises, (K,)."""
        return np.diag(self.counts) / np.maximum(self.counts.sum(axis=1), 1)

    @property
    def unrecognised(self) -> list[str]:
        """Values of whose images it does not recognise more than half: it is no witness of these."""
        worst = self.recall
        for counts in self.of_group.values():
            seen = counts.sum(axis=1)
            worst = np.where(seen > 0, np.minimum(worst, np.diag(counts) / np.maximum(seen, 1)), worst)
        return [value for value, share in zip(self.values, worst, strict=True) if not share > TRUSTED]

    def of(self, group: str) -> np.ndarray:
        """Counts for a group of prompts: its own where each value was seen in it often enough, else those of
        all."""
        own = self.of_group.get(group)
        return own if own is not None and (own.sum(axis=1) >= ENOUGH).all() else self.counts


def calibrate(
    values: Sequence[str], groups: Sequence[str], truth: Sequence[str], said: Sequence[str]
) -> Calibration:
    """What a classifier says of labelled images, one a row.

    Raises:
        DataError: a value has no image, so that its error is unknown, or a label is no value.
    """
    place = {value: number for number, value in enumerate(values)}
    unknown = sorted(set(truth) - set(place))
    if unknown:
        raise DataError(f"labels {', '.join(unknown)} are no values; expected {', '.join(values)}")
    of_group: dict[str, np.ndarray] = {}
    for group, true, heard in zip(groups, truth, said, strict=True):
        table = of_group.setdefault(group, np.zeros((len(values), len(values))))
        table[place[true], place[heard]] += 1
    counts = sum(of_group.values(), np.zeros((len(values), len(values))))
    without = [value for value in values if counts[place[value]].sum() == 0]
    if without:
        raise DataError(
            f"no labelled image shows {', '.join(without)}, so the classifier's error is unknown for it"
        )
    return Calibration(tuple(values), counts, of_group)


@dataclass(frozen=True)
class Drawn:
    """What one model drew for one group of prompts: images by what is said of them, and those that cannot be
    read; shares of each value and distances from uniform and from a reference mix, with 95% intervals."""

    group: str
    said: tuple[int, ...]
    unread: int
    shares: tuple[Interval, ...]
    from_uniform: Interval
    fair: float
    from_reference: Interval | None


@dataclass(frozen=True)
class Mix:
    """One attribute of one model: its groups, and the mean of their distances."""

    groups: tuple[Drawn, ...]
    from_uniform: Interval
    from_reference: Interval | None
    draws: np.ndarray
    """Draws of the mean distance from uniform, for the interval of a difference."""


def measure_mix(
    said: Mapping[str, Sequence[int]],
    unread: Mapping[str, int],
    calibration: Calibration | None,
    reference: Mapping[str, Sequence[float]],
    *,
    resamples: int,
    key: tuple[str | int, ...],
) -> Mix:
    """Shares and distances of every group.

    Args:
        said: Group -> images of which each value is said, (K,); groups without a readable image are left out.
        unread: Group -> images that say nothing.
        calibration: Errors of the classifier; None counts what it says as it is.
        reference: Group -> shares (K,) that are compared with; those that it does not have are not.
        resamples: Draws for the intervals.
        key: Names the draws.
    Raises:
        DataError: no group has a readable image.
    """
    groups, far, off = [], [], []
    for group, counts in said.items():
        if not sum(counts):
            continue
        one, drawn, apart = _measure_group(
            group, counts, unread.get(group, 0), calibration, reference.get(group), resamples, (*key, group)
        )
        groups.append(one)
        far.append(drawn)
        off.append(apart)
    if not groups:
        raise DataError("no image can be read, so nothing is known of what is drawn")
    draws = np.mean(far, axis=0)
    estimate = float(np.mean([one.from_uniform[0] for one in groups]))
    references = [one.from_reference for one in groups if one.from_reference is not None]
    from_reference = None
    if len(references) == len(groups):
        middle = float(np.mean([one[0] for one in references]))
        from_reference = _interval(middle, np.mean(off, axis=0))
    return Mix(tuple(groups), _interval(estimate, draws), from_reference, draws)


# Many parameters because one group has as many facts.
def _measure_group(
    group: str,
    counts: Sequence[int],
    unread: int,
    calibration: Calibration | None,
    reference: Sequence[float] | None,
    resamples: int,
    key: tuple[str | int, ...],
) -> tuple[Drawn, np.ndarray, np.ndarray]:
    number = len(counts)
    uniform, generator = np.full(number, 1 / number), numpy_generator(*key, "mix")
    q = generator.dirichlet(np.asarray(counts) + 1 / number, resamples)
    if calibration is None:
        p, drawn = np.asarray(counts) / sum(counts), q
    else:
        known = calibration.of(group)
        tables = np.stack([generator.dirichlet(row + 1 / number, resamples) for row in known], axis=1)
        p, drawn = (
            corrected_shares(counts, known / known.sum(axis=1, keepdims=True)),
            corrected_shares(q, tables),
        )
    shares = tuple(_interval(float(p[k]), drawn[:, k]) for k in range(number))
    far = total_variation(drawn, uniform)
    off = far if reference is None else total_variation(drawn, reference)
    one = Drawn(
        group=group,
        said=tuple(int(count) for count in counts),
        unread=unread,
        shares=shares,
        from_uniform=_interval(float(total_variation(p, uniform)), far),
        fair=fair_distance(number, sum(counts)),
        from_reference=None if reference is None else _interval(float(total_variation(p, reference)), off),
    )
    return one, far, off


def difference(after: Mix, before: Mix) -> Interval:
    """Mean distance from uniform after, less before; draws of both are independent."""
    estimate = after.from_uniform[0] - before.from_uniform[0]
    return _interval(estimate, after.draws - before.draws)


def wilson_interval(hits: int, total: int) -> Interval:
    """A share with its 95% interval by Wilson's score; 0 of 10 gives (0, 0, 0.278).

    Raises:
        DataError: no trial, or more hits than trials.
    """
    if not 0 <= hits <= total or total == 0:
        raise DataError(f"wilson_interval: {hits} of {total}; expected 0 <= hits <= total, total > 0")
    z, share = 1.959964, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def _interval(estimate: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    # Draws from a prior lean to the middle; the interval holds the estimate itself in any case.
    return estimate, min(float(low), estimate), max(float(high), estimate)
