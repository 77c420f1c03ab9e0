"""How a suite's scores become its table: the rules that benchmarks publish, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.rng import numpy_generator

Estimate = tuple[float, float, float]
CHUNKS = 10


def chunk_means(values: ArrayLike, chunks: int = CHUNKS) -> tuple[float, float]:
    """Mean and spread of the means of consecutive parts: HPSv2's own error bar of a style.

        m_k = mean of the k-th of `chunks` consecutive parts;  (mean_k m_k, sqrt(mean_k (m_k - mean)^2))

    Args:
        values: Scores (N,) of one category in the published order; non-finite ones are left out of their
            part.
        chunks: Number of parts; of 800 values ten have 80 each. Where N is no multiple the first ones have
            one more.
    Returns:
        (mean, spread); 0, 1, ..., 9 in ten parts are (4.5, 2.872...). Fewer values than parts have no spread:
        (mean, nan).
    Raises:
        DataError: no value is finite.
    Source: hpsv2/evaluation.py of HPSv2 (`range(0, 800, 80)`), which takes the population's standard
        deviation.
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        raise DataError("chunk_means: no finite value among the scores given")
    if len(numbers) < chunks:
        return float(finite.mean()), math.nan
    parts = [part[np.isfinite(part)] for part in np.array_split(numbers, chunks)]
    means = np.array([part.mean() for part in parts if part.size])
    return float(means.mean()), float(means.std())


def mean_of_categories(
    values: ArrayLike,
    categories: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 10000,
    seed: int = 0,
) -> Estimate:
    """The unweighted mean of the categories' means over images, with a 95% interval over prompts.

        total = 1/C sum_c mean_{i in c} v_i

    Args:
        values: Scores (N,); non-finite ones are left out.
        categories, clusters: Category and prompt of each value; prompts are resampled within their category.
        resamples, seed: Number of resamples and their name.
    Returns:
        (total, low, high); [1, 0, 0] of the categories a, b, b is 0.5. A single prompt has no interval.
    Raises:
        DataError: no value is finite.
    Source: evaluation/summary_scores.py of GenEval ("Overall score (avg. over tasks)").
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = np.isfinite(numbers)
    groups: dict[Hashable, dict[Hashable, list[float]]] = {}
    for value, category, cluster, is_there in zip(numbers, categories, clusters, finite, strict=True):
        if is_there:
            groups.setdefault(category, {}).setdefault(cluster, []).append(float(value))
    if not groups:
        raise DataError("mean_of_categories: no finite value among the scores given")
    totals = np.zeros(resamples)
    mean = 0.0
    generator = numpy_generator(seed, "categories", len(numbers))
    for prompts in groups.values():
        sums = np.array([sum(found) for found in prompts.values()])
        counts = np.array([len(found) for found in prompts.values()], dtype=np.float64)
        mean += float(sums.sum() / counts.sum()) / len(groups)
        drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
        totals += (drawn @ sums) / (drawn @ counts) / len(groups)
    if all(len(prompts) < 2 for prompts in groups.values()):
        return mean, math.nan, math.nan
    low, high = np.percentile(totals, [2.5, 97.5])
    return mean, float(low), float(high)


def total(
    rule: str,
    values: ArrayLike,
    categories: Sequence[str],
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """A judge's total over a suite by the suite's rule, with its 95% interval over prompts."""
    if rule == "tasks":
        return mean_of_categories(values, categories, clusters, resamples=resamples, seed=seed)
    return bootstrap_mean(values, clusters, resamples=resamples, seed=seed)


def in_order(categories: Sequence[str], wanted: Mapping[str, int]) -> list[str]:
    """The categories that occur, those of the suite in its order first, then the others by name."""
    there = dict.fromkeys(categories)
    return [
        *(name for name in wanted if name in there),
        *sorted(name for name in there if name not in wanted),
    ]
