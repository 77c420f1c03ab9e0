"""Several scores of the same candidates become one ranking within each prompt.

Scores are arrays (G, n): G prompts, n candidates. A candidate without a score under any reward has none in
the mixture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from diffexpo.errors import RewardError

# Smallest within-prompt std that is divided by: below it the differences are rounding, not preference.
STD_FLOOR = 1e-6


def mix_rewards(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    kind: Literal["zscore", "global", "rank", "pareto"],
) -> np.ndarray:
    """One score a candidate, comparable within its prompt.

        zscore: sum_k w_k (r_k - mean_G) / max(std_G, floor)
        global: as zscore, with mean and std over all candidates of all prompts at hand
        rank:   sum_k w_k rank_k, ranks in [0, 1], ties averaged

    With one reward all kinds return it unscaled (negated if its weight is negative), so that margins are in
    its own units. `pareto` orders as `zscore`; `dominance` says which pairs are kept.

    Args:
        scores: name -> (G, n), NaN where scoring failed.
        weights: name -> weight of every score; not 0.
        kind: How to mix.
    Returns:
        (G, n) float64, NaN where any reward is NaN. Scores [[0, 1]] under two rewards of weight 1 give
        z-scores [[-2, 2]]. Under `global` the numbers also depend on which prompts are scored together.
    Raises:
        RewardError: no reward, shapes or names that differ, a weight of 0.
    Source: the papers say only "multi-reward"; within-group z-scores are what current multi-reward trainers
    default to.
    """
    stacked, signs = _stack(scores, weights)
    if len(stacked) == 1:
        return np.sign(signs[0]) * stacked[0]
    parts = _ranks(stacked) if kind == "rank" else _zscores(stacked, (1, 2) if kind == "global" else (2,))
    return np.einsum("k,kgn->gn", signs, parts)


def dominance(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """(G, n, n) bool: candidate i is strictly better than j under every reward, by the sign of its weight."""
    directed = _directed(scores, weights)
    # Comparisons with NaN are False: a candidate without a score neither wins nor loses.
    return np.all(directed[:, :, :, None] > directed[:, :, None, :], axis=0)


def uncertainty(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Population std over scorers of their per-prompt z-scores, (G, n), NaN where one is NaN.

    Raises:
        RewardError: fewer than two scorers.
    """
    if len(scores) < 2:
        advice = "add one or set algorithm.uncertainty=off"
        raise RewardError(f"uncertainty: needs two or more rewards, got {len(scores)}; {advice}")
    stacked, _ = _stack(scores, dict.fromkeys(scores, 1.0))
    return _zscores(stacked).std(axis=0)


def conflicts(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float] | None = None
) -> dict[tuple[str, str], float]:
    """Rank correlation (Spearman) of every two scorers within prompts, averaged over those where both vary.

    Args:
        scores: name -> (G, n), NaN where scoring failed; two scorers are compared where both have a score.
        weights: A negative weight turns that scorer's order around; None: all count as they are.
    Returns:
        (name, name) -> correlation in [-1, 1], 1 for the same order; NaN if no prompt decides.
    """
    found: dict[tuple[str, str], float] = {}
    for names, pair in _couples(scores, weights):
        values = []
        for a, b in zip(*_ranks(pair), strict=True):
            a, b = a[np.isfinite(a)], b[np.isfinite(b)]
            if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0:
                values.append(float(np.corrcoef(a, b)[0, 1]))
        found[names] = float(np.mean(values)) if values else math.nan
    return found


def disagreements(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float] | None = None
) -> dict[tuple[str, str], float]:
    """Share of a prompt's pairs of candidates that two scorers order oppositely.

        share = #{i < j: (a_i - a_j) (b_i - b_j) < 0} / #{i < j: (a_i - a_j) (b_i - b_j) != 0}

    Args:
        scores, weights: As in `conflicts`.
    Returns:
        (name, name) -> share in [0, 1], 0 for the same order everywhere; NaN if no pair is decided under
        both. Of a = [[1, 2, 3]] and b = [[1, 3, 2]]: 1/3.
    """
    found: dict[tuple[str, str], float] = {}
    for names, pair in _couples(scores, weights):
        # Each pair occurs twice, with both signs turned, so the share is that over i < j.
        products = np.prod(pair[..., :, None] - pair[..., None, :], axis=0)
        decided = int((products > 0).sum() + (products < 0).sum())
        found[names] = float((products < 0).sum() / decided) if decided else math.nan
    return found


def most_disputed(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt the couple of candidates whose order two scorers dispute most, and how much.

        dispute_ij = max_{a, b} - (a_i - a_j) (b_i - b_j),   a and b z-scores within the prompt

    Args:
        scores, weights: As in `mix_rewards`; a negative weight turns that scorer's order around.
    Returns:
        Places (G, 2) and disputes (G,), > 0 where the couple's order is disputed, -inf where a prompt has
        fewer than two candidates with scores. Of a = [[1, 2, 3]] and b = [[3, 2, 1]] the couple is (0, 2).
    Raises:
        RewardError: fewer than two scorers.
    """
    if len(scores) < 2:
        raise RewardError(f"disputes need two rewards or more, got {len(scores)}")
    stacked, signs = _stack(scores, weights)
    z = np.sign(signs)[:, None, None] * _zscores(stacked)
    gaps = z[:, :, :, None] - z[:, :, None, :]
    products = [-gaps[a] * gaps[b] for a, b in itertools.combinations(range(len(z)), 2)]
    dispute = np.nan_to_num(np.max(products, axis=0), nan=-np.inf)
    number = dispute.shape[-1]
    dispute[:, np.tri(number, dtype=bool)] = -np.inf  # each couple once, none with itself
    flat = dispute.reshape(len(dispute), -1)
    best = flat.argmax(axis=1)
    return np.stack([best // number, best % number], axis=1), flat.max(axis=1)


def conflict_metrics(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> dict[str, float]:
    """The metrics `rollout/conflict/<a>:<b>/rank_correlation` and `.../disagreement` of every two scorers.

    `weights` are those of the scorers that rank; one that is only watched counts as it is. There are no
    metrics with one scorer, or where nothing is decided.
    """
    measures = {"rank_correlation": conflicts, "disagreement": disagreements}
    return {
        f"rollout/conflict/{first}:{second}/{what}": value
        for what, measure in measures.items()
        for (first, second), value in measure(scores, weights).items()
        if np.isfinite(value)
    }


def _couples(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float] | None
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Every two scorers with their directed scores (2, G, n), NaN where either has none."""
    for names in itertools.combinations(scores, 2):
        signs = {name: (weights or {}).get(name, 1.0) for name in names}
        yield names, _directed({name: scores[name] for name in names}, signs)


def _directed(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Scores (K, G, n) turned so that higher is better."""
    stacked, signs = _stack(scores, weights)
    return np.sign(signs)[:, None, None] * stacked


def _stack(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (K, G, n) with NaN wherever any is not finite, and weights (K,)."""
    if not scores:
        raise RewardError("mixture: no train reward; expected at least one with role=train")
    if scores.keys() != weights.keys():
        advice = "expected the same names"
        raise RewardError(f"mixture: scores of {sorted(scores)} but weights of {sorted(weights)}; {advice}")
    for name, weight in weights.items():
        if weight == 0 or not np.isfinite(weight):
            advice = "use role=watch for a reward that must not rank"
            raise RewardError(f"mixture: reward {name!r} has weight {weight}; {advice}")
    shapes = {name: np.shape(values) for name, values in scores.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise RewardError(f"mixture: shapes {shapes}; expected one (prompts, candidates) for all")
    stacked = np.stack([np.asarray(values, dtype=np.float64) for values in scores.values()])
    usable = np.isfinite(stacked).all(axis=0)
    return np.where(usable, stacked, np.nan), np.array([float(weights[name]) for name in scores])


def _zscores(stacked: np.ndarray, axes: tuple[int, ...] = (2,)) -> np.ndarray:
    """Z-scores per reward and prompt (axes 1 and 2: over all prompts); what is constant becomes all 0."""
    usable = np.isfinite(stacked)
    count = np.maximum(usable.sum(axis=axes, keepdims=True), 1)
    mean = np.where(usable, stacked, 0.0).sum(axis=axes, keepdims=True) / count
    centred = stacked - mean
    std = np.sqrt(np.where(usable, centred**2, 0.0).sum(axis=axes, keepdims=True) / count)
    return centred / np.maximum(std, STD_FLOOR)


def _ranks(stacked: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1] within each prompt, ties averaged, NaN kept; a group of one is 0.5."""
    above = (stacked[..., :, None] > stacked[..., None, :]).sum(axis=-1)
    equal = (stacked[..., :, None] == stacked[..., None, :]).sum(axis=-1) - 1
    others = np.isfinite(stacked).sum(axis=-1, keepdims=True) - 1
    ranks = np.where(others > 0, (above + 0.5 * equal) / np.maximum(others, 1), 0.5)
    return np.where(np.isfinite(stacked), ranks, np.nan)
