r"""Pairing: the best and the worst of a prompt's candidates become winner and loser.

    w = argmax_i r_i,   l = argmin_i r_i,   kept if r_w - r_l > min_margin      (West-of-n, EXPO algorithm 1)

Ties and groups with fewer than two finite scores give no pair and are counted. With `pareto` the winner must
beat the loser under *every* reward; among such couples the one with the largest mixed gap is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.data.rows import Pair, Sample
from diffexpo.rng import keyed_choice


def best_and_worst(scores: Tensor, min_margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the best and worst candidate of each group, and whether they differ enough.

        best = argmax_i r_i, worst = argmin_i r_i, valid = r_best - r_worst > min_margin

    Args:
        scores: Rewards, shape (G, n); NaN marks a candidate whose scoring failed and is never chosen.
        min_margin: Smallest gap, in units of the scores, >= 0; the gap must exceed it, so ties are invalid.
    Returns:
        (best, worst, valid), each (G,): long, long, bool. For [[1., 3., 2.]]: 1, 0, True. The first of equal
        candidates is taken; a group with fewer than two finite scores is invalid.
    Source: EXPO algorithm 1 (best and worst of 2B); tie and margin rules are ours.
    """
    finite = torch.isfinite(scores)
    high, low = scores.masked_fill(~finite, -torch.inf), scores.masked_fill(~finite, torch.inf)
    is_apart = high.amax(dim=1) - low.amin(dim=1) > min_margin
    return high.argmax(dim=1), low.argmin(dim=1), (finite.sum(dim=1) >= 2) & is_apart


def best_dominating(beats: Tensor, mixed: Tensor, min_margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Like `best_and_worst`, over couples whose winner beats the loser under every reward (Pareto).

        (w, l) = argmax over allowed (i, j) of r_i - r_j,
        allowed = i beats j under every reward, and r_i - r_j > min_margin

    Args:
        beats: (G, n, n) bool, candidate i is strictly better than j under every reward.
        mixed: Mixed score (G, n), NaN where a candidate is out.
        min_margin: Smallest mixed gap.
    Returns:
        (best, worst, valid), each (G,); with one reward the same as `best_and_worst`.
    Source: the multi-reward comparison of D3PO; the papers leave EXPO-II-M's combination open.
    """
    gap = mixed[:, :, None] - mixed[:, None, :]
    allowed = beats & torch.isfinite(gap) & (gap > min_margin)
    choice = gap.masked_fill(~allowed, -torch.inf).flatten(1).argmax(dim=1)
    return choice // mixed.shape[1], choice % mixed.shape[1], allowed.flatten(1).any(dim=1)


@dataclass
class Paired:
    """The pairs of one iteration, and what was dropped of `groups` prompts; `agents` drew the images.

    `asked` of the prompts were judged by people: of those, `people_tie` had no winner and `people_disagree`
    too little agreement on one.
    """

    groups: int
    agents: frozenset[str] = frozenset()
    pairs: list[Pair] = field(default_factory=list)
    dropped_tie: int = 0
    dropped_nan: int = 0
    asked: int = 0
    people_tie: int = 0
    people_disagree: int = 0
    winner_with_negative: int = 0

    def describe(self) -> str:
        """One line for a person; it tells agents apart where there are two."""
        dropped = f"{self.dropped_tie} ties, {self.dropped_nan} without two scores"
        line = f"{len(self.pairs)} pairs of {self.groups} prompts ({dropped})"
        if self.asked:
            by_people = f"{len(self.by_people)} of {self.asked} that people judged"
            line += f", {by_people} ({self.people_tie} ties, {self.people_disagree} too contradictory)"
        if len(self.agents) < 2:
            return line
        explored = sum(pair.winner_agent == "exploration" for pair in self.pairs)
        return f"{line}, {explored} winners from the exploration agent"

    @property
    def by_people(self) -> list[Pair]:
        """The pairs that people's votes made."""
        return [pair for pair in self.pairs if pair.votes is not None]

    def metrics(self) -> dict[str, float]:
        """Metric name -> value, as documented on the evaluation page."""
        return self._counts() | (self._people() if self.asked else {})

    def _people(self) -> dict[str, float]:
        pairs = self.by_people
        return {
            "people/asked": self.asked,
            "people/pairs": len(pairs),
            "people/ties": self.people_tie,
            "people/disagreed": self.people_disagree,
            "people/votes": sum(pair.votes or 0 for pair in pairs),
            "people/agreement": float(np.mean([pair.agreement for pair in pairs])) if pairs else 0.0,
        }

    def _counts(self) -> dict[str, float]:
        pairs, kept = self.pairs, max(len(self.pairs), 1)
        return {
            "pairs/count": len(pairs),
            "pairs/groups": self.groups,
            "pairs/dropped_ties": self.dropped_tie,
            "pairs/dropped_nan": self.dropped_nan,
            "pairs/margin_mean": float(np.mean([pair.margin for pair in pairs])) if pairs else 0.0,
            "pairs/winner_from_exploration": sum(p.winner_agent == "exploration" for p in pairs) / kept,
            "pairs/loser_from_exploration": sum(p.loser_agent == "exploration" for p in pairs) / kept,
            "pairs/winner_from_negative": self.winner_with_negative / kept,
        }


def make_pairs(
    groups: Sequence[Sequence[Sample]],
    mixed: np.ndarray,
    *,
    iteration: int,
    seed: int,
    judge: str,
    min_margin: float = 0.0,
    dominance: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
) -> Paired:
    """Pairs of one iteration, one at most for each group of candidates.

    Args:
        groups: G groups of n samples; all samples of a group share the prompt.
        mixed: Mixed score (G, n), NaN where a candidate is out.
        iteration, seed: Names of the pair ids and of the contrast draw.
        judge: What ranked them, for the lineage.
        min_margin: The gap must exceed it.
        dominance: (G, n, n) bool: which candidate beats which under every reward; the winner must beat the
            loser (Pareto).
        uncertainty: Gamma of each candidate (G, n), stored with the pair.
    Returns:
        The pairs. Each also names a contrast couple, one image of the exploration agent and one of the main
        agent drawn by key, whenever both agents drew for the prompt.
    """
    scores = torch.as_tensor(mixed, dtype=torch.float64)
    if dominance is None:
        best, worst, valid = best_and_worst(scores, min_margin)
    else:
        best, worst, valid = best_dominating(torch.as_tensor(dominance), scores, min_margin)
    agents = frozenset(sample.agent for group in groups for sample in group)
    paired = Paired(len(groups), agents)
    for index, samples in enumerate(groups):
        if not valid[index]:
            enough = int(torch.isfinite(scores[index]).sum()) >= 2
            paired.dropped_tie += enough
            paired.dropped_nan += not enough
            continue
        w, l = int(best[index]), int(worst[index])
        paired.winner_with_negative += bool(samples[w].negative_prompt)
        pair = pair_of_group(
            samples,
            (w, l),
            (seed, iteration, index),
            judge=judge,
            margin=float(scores[index, w] - scores[index, l]),
            source="online",
            uncertainty_winner=None if uncertainty is None else float(uncertainty[index, w]),
            uncertainty_loser=None if uncertainty is None else float(uncertainty[index, l]),
        )
        paired.pairs.append(pair)
    return paired


def pair_of_group(
    samples: Sequence[Sample], sides: tuple[int, int], name: tuple[int, int, int], **columns: Any
) -> Pair:
    """The pair of a prompt's images at the places (winner, loser), with its contrast couple; `name` is the
    run's seed, the iteration and the number of the prompt in it."""
    w, l = sides
    seed, iteration, index = name
    explored, main = _contrast(samples, seed, iteration, index)
    return pair_against(
        samples[l],
        iteration,
        f"{index:06d}",
        winner_id=samples[w].sample_id,
        winner_agent=samples[w].agent,
        explored_id=explored,
        main_id=main,
        **columns,
    )


def pair_against(loser: Sample, iteration: int, place: str, **columns: Any) -> Pair:
    """The pair that an image lost; `place` tells it from the iteration's other pairs."""
    return Pair(
        pair_id=f"pair-{iteration:04d}-{place}",
        iteration=iteration,
        prompt_id=loser.prompt_id,
        prompt=loser.prompt,
        loser_id=loser.sample_id,
        loser_agent=loser.agent,
        **columns,
    )


def _contrast(samples: Sequence[Sample], seed: int, iteration: int, index: int) -> list[str | None]:
    """An image of the exploration agent and one of the main agent; both None unless both agents drew."""
    ids: list[str | None] = []
    for agent in ("exploration", "main"):
        own = [sample.sample_id for sample in samples if sample.agent == agent]
        ids.append(own[keyed_choice(len(own), seed, iteration, "contrast", agent, index)] if own else None)
    return [None, None] if None in ids else ids
