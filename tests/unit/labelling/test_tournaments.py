"""Tournaments: the posterior against Newton-free optimisation, what is asked next, and how often they are right."""

from __future__ import annotations

import numpy as np
import pytest

from diffexpo.errors import ConfigError
from diffexpo.labelling.tournaments import SPREAD, next_couple, posterior, simulate, standing


def log_density(s: np.ndarray, wins: np.ndarray, spread: float) -> float:
    """log of the prior times the likelihood, written out couple by couple."""
    value = -float((s**2).sum()) / (2 * spread**2)
    for i in range(len(s)):
        for j in range(len(s)):
            value -= wins[i, j] * np.log1p(np.exp(-(s[i] - s[j]))) if i != j else 0.0
    return value


def wins_of(*results: tuple[int, int, float], number: int = 4) -> np.ndarray:
    wins = np.zeros((number, number))
    for a, b, count in results:
        wins[a, b] += count
    return wins


def test_the_mode_is_the_highest_point_and_the_covariance_its_curvature() -> None:
    wins = wins_of((0, 1, 3), (1, 0, 1), (2, 0, 1.5), (0, 2, 0.5), (3, 2, 2))
    mean, covariance = posterior(wins)
    step = 1e-4
    curvature = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            a, b = np.eye(4)[i] * step, np.eye(4)[j] * step
            points = [
                log_density(mean + x * a + y * b, wins, SPREAD)
                for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1))
            ]
            curvature[i, j] = (points[0] - points[1] - points[2] + points[3]) / (4 * step**2)
        slope = log_density(mean + np.eye(4)[i] * step, wins, SPREAD) - log_density(
            mean - np.eye(4)[i] * step, wins, SPREAD
        )
        assert abs(slope / (2 * step)) < 1e-5
    assert np.allclose(np.linalg.inv(-curvature), covariance, atol=1e-3)
    assert mean.sum() == pytest.approx(0.0, abs=1e-8)


def test_without_votes_nothing_is_known() -> None:
    mean, covariance = posterior(np.zeros((3, 3)))
    assert np.allclose(mean, 0) and np.allclose(covariance, SPREAD**2 * np.eye(3))
    assert standing(np.zeros((3, 3))).probability == 0.5


def test_who_leads_and_who_is_last() -> None:
    found = standing(wins_of((2, 0, 5), (2, 1, 5), (1, 3, 5)))
    assert (found.best, found.worst) == (2, 3) and found.probability > 0.9
    more = standing(wins_of((2, 0, 50), (2, 1, 50), (1, 3, 50)))
    assert more.probability > found.probability
    # Turned around, the order is.
    turned = standing(wins_of((2, 0, 5), (2, 1, 5), (1, 3, 5)).T)
    assert (turned.best, turned.worst) == (3, 2) and turned.probability == pytest.approx(found.probability)


def test_a_couple_is_two_images_named_by_its_key() -> None:
    wins = wins_of((0, 1, 1))
    couples = [next_couple(wins, 0, "round", number) for number in range(30)]
    assert couples == [next_couple(wins, 0, "round", number) for number in range(30)]
    assert all(a != b for a, b in couples) and len(set(couples)) > 3


def test_votes_go_to_images_that_may_still_be_the_best() -> None:
    """0 and 1 beat all others by far and are equal: nearly all couples are these two."""
    wins = wins_of((0, 2, 40), (0, 3, 40), (1, 2, 40), (1, 3, 40), (0, 1, 5), (1, 0, 5))
    couples = [set(next_couple(wins, 1, number)) for number in range(40)]
    assert sum(couple == {0, 1} for couple in couples) >= 36


def test_more_rounds_and_votes_are_surer() -> None:
    few, many = simulate(3, 1, 1, trials=60), simulate(3, 4, 9, trials=60)
    assert few[0] < many[0] and few[1] < many[1] and many[0] > 0.85
    with pytest.raises(ConfigError, match="expected 2 candidates or more"):
        simulate(1, 1, 1)
