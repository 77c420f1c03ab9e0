r"""Small tournaments among a prompt's images: which two are asked next, and who has won so far.

    P(i beats j) = sigmoid(s_i - s_j),   s ~ N(0, spread^2 I)                        (Bradley and Terry)
    s | votes ~ N(mode, H^-1),   H = I / spread^2 + sum_{i<j} n_ij p_ij (1 - p_ij) (e_i - e_j)(e_i - e_j)^T

The posterior is Laplace's. Thompson sampling: s is drawn from it twice, and the best of one draw meets the
best of the other (or its second, where they are the same), so votes go to images that may still be the best.

Source: Wu and Liu, "Double Thompson Sampling for Dueling Bandits" (NIPS 2016), with a Bradley-Terry posterior
in place of one for each couple.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffexpo.errors import ConfigError
from diffexpo.rng import numpy_generator

SPREAD = 1.1
"""Standard deviation of strengths beforehand: of two images by chance, three of four people then prefer the
better one on average."""
_STEPS, _TOLERANCE = 50, 1e-10


@dataclass(frozen=True)
class Standing:
    """Places of the best and the worst image by their mean strength, and P(best beats worst in strength)."""

    best: int
    worst: int
    probability: float


def posterior(wins: np.ndarray, spread: float = SPREAD) -> tuple[np.ndarray, np.ndarray]:
    """Mean (k,) and covariance (k, k) of the strengths.

    Args:
        wins: (k, k), wins[i, j] is how often i was preferred to j, a tie one half on both sides.
        spread: Standard deviation beforehand, > 0.
    Returns:
        Laplace's approximation. Without votes 0 and spread^2 I; the means sum to 0.
    """
    counts, number = wins + wins.T, len(wins)
    s = np.zeros(number)
    precision = np.eye(number) / spread**2
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(s[:, None] - s[None, :])))
        weights = counts * p * (1 - p)
        np.fill_diagonal(weights, 0.0)
        precision = np.eye(number) / spread**2 + np.diag(weights.sum(axis=1)) - weights
        slope = (wins - counts * p).sum(axis=1) - np.diag(wins - counts * p) - s / spread**2
        step = np.linalg.solve(precision, slope)
        s = s + step
        if np.abs(step).max() < _TOLERANCE:
            break
    return s, np.linalg.inv(precision)


def next_couple(wins: np.ndarray, *key: str | int, spread: float = SPREAD) -> tuple[int, int]:
    """The two images that are asked next (module's rule); `key` names the draws."""
    mean, covariance = posterior(wins, spread)
    generator = numpy_generator(*key, "thompson")
    first, second = generator.multivariate_normal(mean, covariance, 2)
    best, order = int(first.argmax()), np.argsort(-second, kind="stable")
    return best, int(order[0] if order[0] != best else order[1])


def standing(wins: np.ndarray, spread: float = SPREAD) -> Standing:
    """Who leads and who is last, and how sure that is; without votes 1/2."""
    mean, covariance = posterior(wins, spread)
    best, worst = int(mean.argmax()), int(mean.argmin())
    if best == worst:
        return Standing(0, len(wins) - 1, 0.5)
    variance = covariance[best, best] + covariance[worst, worst] - 2 * covariance[best, worst]
    z = (mean[best] - mean[worst]) / math.sqrt(max(float(variance), 1e-300))
    return Standing(best, worst, 0.5 * (1 + math.erf(z / math.sqrt(2))))


def simulate(
    candidates: int, rounds: int, votes: int, *, trials: int = 300, spread: float = SPREAD, seed: int = 0
) -> tuple[float, float]:
    """How often a tournament is right, by simulation with strengths from N(0, spread^2).

    Args:
        candidates: Images of a prompt, >= 2. rounds: Couples that are asked one after another.
        votes: Votes on each couple.
    Returns:
        (share of prompts whose pair has its better image first, share whose winner is the best of all).
    Raises:
        ConfigError: fewer than two candidates, or no round or vote.
    """
    if candidates < 2 or rounds < 1 or votes < 1:
        told = f"candidates = {candidates}, rounds = {rounds}, votes = {votes}"
        raise ConfigError(f"{told}: expected 2 candidates or more, 1 round and 1 vote or more")
    right = found = 0
    for trial in range(trials):
        key = (seed, "tournament", candidates, rounds, votes, trial)
        generator = numpy_generator(*key)
        s = generator.normal(0.0, spread, candidates)
        wins = np.zeros((candidates, candidates))
        for number in range(rounds):
            a, b = next_couple(wins, *key, number, spread=spread)
            for_a = int(generator.binomial(votes, 1 / (1 + math.exp(s[b] - s[a]))))
            wins[a, b] += for_a
            wins[b, a] += votes - for_a
        end = standing(wins, spread)
        right += bool(s[end.best] > s[end.worst])
        found += bool(end.best == s.argmax())
    return right / trials, found / trials
