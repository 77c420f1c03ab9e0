"""The numbers of a comparison, with NumPy alone: win rate, means with intervals, Vendi score, Bradley-Terry.

Every interval is a percentile bootstrap over *prompts* (clusters): images of one prompt are similar, so
resampling single images would understate the uncertainty. Over n clusters the plain percentiles are as narrow
as a normal interval with variance s^2 (n - 1) / n; the share left out at each end is therefore

    Phi(-sqrt(n / (n - 1)) t_{0.975, n - 1})    instead of 0.025,

which gives means the coverage of Student's t. Source: Hesterberg, "What Teachers Should Know About the
Bootstrap" (2015), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.errors import DataError
from diffexpo.rng import numpy_generator

_CHUNK = 2_000_000


@dataclass(frozen=True)
class WinRate:
    """How often a beats b: `rate`, `low`, `high` in [0, 1]; `wins`, `ties`, `losses` count image pairs."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    num: int
    num_prompts: int
    p_value: float
    dropped: int = 0

    @property
    def interval(self) -> tuple[float, float, float]:
        """(rate, low, high)."""
        return self.rate, self.low, self.high

    @property
    def verdict(self) -> str:
        """`better` if the interval lies above one half, `worse` if below, else `undecided`."""
        if self.low > 0.5:
            return "better"
        return "worse" if self.high < 0.5 else "undecided"


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> WinRate:
    """Share of comparisons that a wins, ties counting one half: the mean over prompts of their means.

        rate = mean_p mean_{i in p} [ 1(a_i > b_i) + 1/2 1(a_i = b_i) ]

    Args:
        a, b: Scores (N,) of two models for the same prompts and seeds, row by row; rows with a non-finite
            score are dropped and counted.
        prompts: Prompt of each row (N,); without it every row is its own prompt.
        resamples: Bootstrap resamples of prompts for the 95% interval.
        seed: Names the resampling.
    Returns:
        A WinRate. a > b everywhere gives rate 1; win_rate(b, a).rate is 1 - win_rate(a, b).rate. If every
        prompt is won (or lost) the bootstrap has no spread, so the exact binomial bound 0.025**(1/prompts)
        replaces its inner end; of one prompt that is neither, nothing is known: [0, 1]. `p_value` is the
        exact two-sided sign test over prompts without tied ones.
    Raises:
        DataError: shapes differ, or no row is finite.
    """
    left, right = np.asarray(a, dtype=np.float64).reshape(-1), np.asarray(b, dtype=np.float64).reshape(-1)
    labels = number_labels(prompts, len(left))
    if len(left) != len(right):
        counts = f"a has {len(left)} scores and b has {len(right)}"
        raise DataError(f"win_rate: {counts}; score the same prompts and seeds for both")
    finite = np.isfinite(left) & np.isfinite(right)
    if not finite.any():
        raise DataError("win_rate: no row has a finite score in both a and b; check the scorer")
    left, right, kept = left[finite], right[finite], labels[finite]
    outcome = np.where(left > right, 1.0, np.where(left == right, 0.5, 0.0))
    means = _cluster_means(outcome, kept)
    low, high = _interval(means, resamples, seed) if len(means) > 1 else (0.0, 1.0)
    if (means == 1.0).all():
        low = 0.025 ** (1.0 / len(means))
    if (means == 0.0).all():
        high = 1.0 - 0.025 ** (1.0 / len(means))
    return WinRate(
        rate=float(means.mean()),
        low=low,
        high=high,
        wins=int((outcome == 1.0).sum()),
        ties=int((outcome == 0.5).sum()),
        losses=int((outcome == 0.0).sum()),
        num=len(outcome),
        num_prompts=len(means),
        p_value=sign_test(int((means > 0.5).sum()), int((means < 0.5).sum())),
        dropped=int((~finite).sum()),
    )


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided binomial p-value that wins and losses are equally likely.

        p = min(1, 2 P[X <= min(wins, losses)]),  X ~ Binomial(wins + losses, 1/2)

    The counts are >= 0 without ties, p in (0, 1]; sign_test(6, 0) = 2/64, sign_test(0, 0) = 1.
    """
    num = wins + losses
    tail = sum(math.comb(num, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << num))


def bootstrap_mean(
    values: ArrayLike, clusters: Sequence[Hashable] | None = None, *, resamples: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over clusters of their means, with its 95% percentile bootstrap interval over clusters.

    Args:
        values: Numbers (N,); non-finite ones are left out.
        clusters: Cluster (prompt) of each value; without it every value is its own.
        resamples, seed: Number of resamples and their name.
    Returns:
        (mean, low, high); a constant gives (c, c, c). One cluster has a mean and no interval: both ends are
        NaN. DataError if there is no finite value.
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    labels = number_labels(clusters, len(numbers))
    finite = np.isfinite(numbers)
    if not finite.any():
        raise DataError("bootstrap_mean: no finite value among the numbers given")
    means = _cluster_means(numbers[finite], labels[finite])
    low, high = _interval(means, resamples, seed) if len(means) > 1 else (math.nan, math.nan)
    return float(means.mean()), low, high


def vendi_score(embeddings: ArrayLike, q: float = 1.0) -> float:
    """Effective number of different items: the exponentiated entropy of the similarity matrix's spectrum.

        K = cosine Gram matrix / n with eigenvalues l_i
        VS_q = exp( log(sum_i l_i^q) / (1 - q) ),  VS_1 = exp(-sum_i l_i log l_i)

    Args:
        embeddings: Features (n, d), one row an item; rows are normalised to length 1 here.
        q: Order >= 0: small orders weigh rare items more, `inf` gives 1 / max lambda.
    Returns:
        A number in [1, n]: n equal rows give 1, n orthogonal rows give n. Report n with it.
    Raises:
        DataError: not a (n, d) array of finite numbers, a row of zeros, or q < 0.
    Source: Friedman and Dieng, "The Vendi Score" (2023), definition 3.1; order q: Pasarkar and Dieng (2024).
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        expected = "expected finite numbers of shape (n, d)"
        raise DataError(f"vendi_score: embeddings of shape {rows.shape}; {expected}")
    if q < 0 or math.isnan(q):
        raise DataError(f"vendi_score: q = {q}; expected an order >= 0")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any():
        undefined = "an embedding is all zeros, so its cosine similarity is undefined"
        raise DataError(f"vendi_score: {undefined}; check the embedder")
    rows = rows / norms
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = np.linalg.eigvalsh(gram / rows.shape[0])
    values = values[values > 1e-12]
    values = values / values.sum()
    if math.isinf(q):
        return float(1.0 / values.max())
    if q == 1.0:
        return float(np.exp(-(values * np.log(values)).sum()))
    return float(np.exp(np.log((values**q).sum()) / (1.0 - q)))


def bradley_terry(
    wins: ArrayLike, *, prior: float = 0.0, tolerance: float = 1e-10, max_steps: int = 10000
) -> np.ndarray:
    """Maximum-likelihood strengths of players from a table of wins.

        P(i beats j) = p_i / (p_i + p_j)

    Args:
        wins: (k, k); wins[i, j] is how often i beat j (a tie is 0.5 on both sides). The diagonal is ignored.
        prior: Pseudo-wins added to every ordered couple, >= 0: shrinks the strengths together.
        tolerance: Stop when no log strength moves by more.
        max_steps: Most rounds.
    Returns:
        Strengths (k,), positive, summing to 1; [[0, 3], [1, 0]] gives [0.75, 0.25].
    Raises:
        DataError: not a square table of finite numbers >= 0; or, without a prior, some group never lost to
            the rest (then no finite maximum exists: a solver would return whatever it had when it stopped).
    Source: Bradley and Terry (1952); existence: Ford (1957); iteration: Newman (2023), eq. 10.
    """
    table = np.array(wins, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or table.shape[0] < 1:
        raise DataError(f"bradley_terry: wins of shape {table.shape}; expected a square table")
    if not np.isfinite(table).all() or (table < 0).any() or prior < 0:
        raise DataError("bradley_terry: wins and prior must be finite numbers >= 0")
    table += prior
    np.fill_diagonal(table, 0.0)
    _check_strongly_connected(table)
    if len(table) == 1:
        return np.ones(1)
    log_p = np.zeros(len(table))
    for _ in range(max_steps):
        previous = log_p.copy()
        for i in range(len(table)):
            p = np.exp(log_p)
            share = 1.0 / (p[i] + p)
            log_p[i] = math.log((table[i] * p * share).sum()) - math.log((table[:, i] * share).sum())
            log_p -= log_p.mean()
        if np.abs(log_p - previous).max() < tolerance:
            break
    strengths = np.exp(log_p - log_p.max())
    return strengths / strengths.sum()


def best_of_n_kl(n: ArrayLike) -> np.ndarray:
    """KL of best-of-n sampling to the base in nats, exact without ties: log n - (n - 1) / n, at most."""
    count = np.asarray(n, dtype=np.float64)
    return np.log(count) - (count - 1.0) / count


def number_labels(groups: Sequence[Hashable] | None, num: int) -> np.ndarray:
    """Labels of `num` rows as numbers 0, 1, ... in order of appearance; None gives each row its own."""
    if groups is None:
        return np.arange(num)
    if len(groups) != num:
        raise DataError(f"{len(groups)} prompt labels for {num} rows; expected one label a row")
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups], dtype=np.int64)


def _cluster_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    _, index = np.unique(labels, return_inverse=True)
    return np.bincount(index, weights=values) / np.bincount(index)


def _interval(means: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    if resamples < 1:
        raise DataError(f"bootstrap resamples = {resamples}; expected at least 1")
    generator = numpy_generator(seed, "bootstrap", len(means))
    rows = max(1, _CHUNK // len(means))
    averages = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        averages.append(means[generator.integers(0, len(means), (count, len(means)))].mean(axis=1))
    tail = 100 * _tail(len(means))
    low, high = np.percentile(np.concatenate(averages), [tail, 100 - tail])
    return float(low), float(high)


@cache
def _tail(num: int) -> float:
    """The share of resamples beyond each end of a 95% interval over `num` clusters, at most 0.025."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-math.sqrt(num / (num - 1)) * stdtrit(num - 1, 0.975)))


def _check_strongly_connected(table: np.ndarray) -> None:
    """Every player must reach every other along wins (repeated squaring of the boolean table)."""
    reach = (table > 0) | np.eye(len(table), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(len(table) + 1)))):
        reach = (reach.astype(np.float64) @ reach.astype(np.float64)) > 0
    if reach.all():
        return
    winners = [i for i in range(len(table)) if not reach[:, i].all()]
    raise DataError(
        f"bradley_terry: the wins do not connect all players both ways (nobody outside reaches player(s) "
        f"{winners}), so no finite strengths maximise the likelihood; add comparisons or set prior > 0"
    )
