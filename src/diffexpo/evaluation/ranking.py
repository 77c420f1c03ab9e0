"""Ranking models by duels: Bradley-Terry strengths with intervals, from judges' scores or people's votes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bradley_terry
from diffexpo.evaluation.people import PREFERENCE, preference
from diffexpo.evaluation.statistics import Estimate, Scores, clustered_error, t_quantile

PRIOR = 0.5
"""Pseudo-wins of each ordered couple in Bradley-Terry strengths, where they would not exist without them."""


@dataclass(frozen=True)
class Duel:
    """One comparison of two models: `value` is 1 where the first wins, 0.5 for a tie, 0 where it loses.

    `prompt` and `other` name what its outcome shares with other duels: the prompt, and the seed or the rater.
    """

    first: str
    second: str
    value: float
    prompt: Hashable
    other: Hashable = None


@dataclass(frozen=True)
class Ranked:
    """A model in a ranking.

    `strength` is the log strength less the mean of all, so that 0 is an average model; `against_average` the
    chance to win against one, 1 / (1 + exp(-strength)); both with 95% intervals. `best` and `worst` are the
    ranks (from 1) that its intervals against the others leave open.
    """

    name: str
    strength: Estimate
    against_average: Estimate
    duels: int
    best: int
    worst: int


@dataclass(frozen=True)
class Ranking:
    """Models from the strongest to the weakest.

    `is_shrunk` says that half a win was added to each side of every couple, because some model lost (or won)
    everything and has no finite strength without it.
    """

    models: tuple[Ranked, ...]
    is_shrunk: bool


def duels_of_scores(models: Mapping[str, Scores]) -> list[Duel]:
    """A duel for every image that two models share (same prompt and noise), the higher score winning."""
    found = []
    for first, second in combinations(models, 2):
        left, right = models[first], models[second]
        for key in left.keys() & right.keys():
            gap = left[key] - right[key]
            if math.isfinite(gap):
                found.append(Duel(first, second, 0.5 + 0.5 * float(np.sign(gap)), key[1], key[0]))
    return found


def duels_of_votes(rows: Sequence[Mapping[str, Any]], question: str) -> list[Duel]:
    """A duel for every answer of people to a question: rows as `people.compare` takes them."""
    return [
        Duel(row["a"], row["b"], preference(row, row["a"]), row["prompt_id"], row["rater"])
        for row in rows
        if row["question"] == question and row["answer"] in PREFERENCE
    ]


# Long because of its table of duels; the mathematics stands in the functions below.
def rank(duels: Sequence[Duel]) -> Ranking:
    """Bradley-Terry strengths of all models in some duels.

        P(i beats j) = 1 / (1 + exp(s_j - s_i)),    sum_i s_i = 0

    Intervals are of the sandwich H^+ B H^+, with H the information of the likelihood and B the covariance of
    its slopes summed over clusters: prompts, crossed with seeds or raters where there are several
    (`statistics.clustered_error`).

    Args:
        duels: At least one, in any order.
    Returns:
        A Ranking. Two models of which one wins 3 of 4 duels have strengths +-0.5493, half of ln 3.
    Raises:
        DataError: there is no duel.
    Source: Bradley and Terry (1952); White, "Maximum likelihood estimation of misspecified models" (1982).
    """
    if not duels:
        raise DataError("rank: no duel; expected at least one comparison of two models")
    names = sorted({name for duel in duels for name in (duel.first, duel.second)})
    place = {name: number for number, name in enumerate(names)}
    first = np.array([place[duel.first] for duel in duels])
    second = np.array([place[duel.second] for duel in duels])
    value = np.array([duel.value for duel in duels])
    wins = np.zeros((len(names), len(names)))
    np.add.at(wins, (first, second), value)
    np.add.at(wins, (second, first), 1 - value)
    strengths, is_shrunk = _strengths(wins)
    chance = 1 / (1 + np.exp(strengths[second] - strengths[first]))
    design = np.zeros((len(duels), len(names)))
    design[np.arange(len(duels)), first] += 1
    design[np.arange(len(duels)), second] -= 1
    information = design.T @ (design * (chance * (1 - chance))[:, None])
    influence = design * (value - chance)[:, None] @ np.linalg.pinv(information, hermitian=True)
    kinds = [[duel.prompt for duel in duels]]
    if len({duel.other for duel in duels}) > 1:
        kinds.append([duel.other for duel in duels])
    above = _is_above(strengths, influence, kinds)
    errors, degrees = clustered_error(influence, *kinds)
    reach = t_quantile(degrees) * errors
    numbers = np.bincount(np.concatenate([first, second]), minlength=len(names))
    ranked = [
        Ranked(
            name=name,
            strength=(own := (float(s), float(s - r), float(s + r))),
            against_average=(_sigmoid(own[0]), _sigmoid(own[1]), _sigmoid(own[2])),
            duels=int(numbers[i]),
            best=1 + int(above[:, i].sum()),
            worst=len(names) - int(above[i].sum()),
        )
        for i, (name, s, r) in enumerate(zip(names, strengths, reach, strict=True))
    ]
    return Ranking(tuple(sorted(ranked, key=lambda one: -one.strength[0])), is_shrunk)


def _strengths(wins: np.ndarray) -> tuple[np.ndarray, bool]:
    """Log strengths with mean 0, and whether they had to be shrunk to exist."""
    try:
        found, is_shrunk = np.log(bradley_terry(wins)), False
    except DataError:
        found, is_shrunk = np.log(bradley_terry(wins, prior=PRIOR)), True
    return found - found.mean(), is_shrunk


def _is_above(
    strengths: np.ndarray, influence: np.ndarray, kinds: Sequence[Sequence[Hashable]]
) -> np.ndarray:
    """(k, k): whether the 95% interval of s_i - s_j lies above 0."""
    count = len(strengths)
    couples = [(i, j) for i in range(count) for j in range(count) if i != j]
    gaps = np.stack([influence[:, i] - influence[:, j] for i, j in couples], axis=1)
    errors, degrees = clustered_error(gaps, *kinds)
    above = np.zeros((count, count), dtype=bool)
    for (i, j), reach in zip(couples, t_quantile(degrees) * errors, strict=True):
        above[i, j] = strengths[i] - strengths[j] > reach
    return above


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
