"""Improved pairs: what the improvement model made of an image wins against that image.

    winner = improver(loser, prompt),   loser = an image of the current model

No score decides unless a filter is asked for. How far winners are from their losers is measured, because both
ends are failures: a winner that is its loser teaches nothing, and one that has nothing to do with it is no
improvement of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffexpo.data.rows import Sample
from diffexpo.online.pairing import Paired, pair_against
from diffexpo.training.engine import Engine
from diffexpo.types import Policy

Couple = tuple[str, Sample, Sample]
IMPROVER = "improver"
# Share of the distance between losers of different prompts below which a winner is its loser, and above which
# it is unrelated.
IDENTITY, UNRELATED = 0.05, 0.9


@dataclass
class Improving:
    """What a run with an improvement model needs beside the policy. Built by `diffexpo.assembly`.

    `save` writes the model's folder; `embed` gives image features (N,D) for the distance of pairs (None: not
    measured).
    """

    policy: Policy
    engine: Engine
    save: Callable[[Path], Path]
    embed: Callable[[Tensor], Tensor] | None = None


@dataclass
class ImprovedPairs(Paired):
    """As of every pairing; `dropped_filter` are pairs that the rewards did not agree with."""

    dropped_filter: int = 0

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{len(self.pairs)} pairs of {self.groups} prompts ({self.dropped_filter} that the rewards did "
            f"not agree with, {self.dropped_nan} without finite latents or scores)"
        )

    def metrics(self) -> dict[str, float]:
        """As of every pairing, with the share that passed the filter."""
        judged = max(len(self.pairs) + self.dropped_filter, 1)
        return super().metrics() | {
            "pairs/dropped_filter": self.dropped_filter,
            "pairs/filter_agrees": len(self.pairs) / judged,
        }


def couples(groups: Sequence[Sequence[Sample]]) -> list[Couple]:
    """(place, winner, loser) of every improved image, in the order of the groups."""
    found = []
    for index, samples in enumerate(groups):
        by_id = {sample.sample_id: sample for sample in samples}
        improved = [sample for sample in samples if sample.improved_from is not None]
        found += [
            (f"{index:06d}-{number:02d}", sample, by_id[str(sample.improved_from)])
            for number, sample in enumerate(improved)
        ]
    return found


def make_improved_pairs(
    groups: Sequence[Sequence[Sample]],
    latent: Callable[[str], np.ndarray],
    *,
    iteration: int,
    score: Callable[[Sequence[Sequence[Sample]]], np.ndarray] | None = None,
    min_margin: float = 0.0,
) -> ImprovedPairs:
    """Pairs of one iteration, one for each improved image.

    Args:
        groups: Samples of each request, those of the model and those of the improver.
        latent: Latents of a sample by id; a pair with one that is not finite is dropped and counted.
        iteration: Names the pairs.
        score: Gaps (P,) between winner and loser of P couples of samples; None keeps all.
        min_margin: With `score`, the gap must exceed it.
    Returns:
        The pairs; the margin is the gap, or 0 without `score`.
    """
    found = couples(groups)
    paired = ImprovedPairs(groups=len(groups))
    both = [[winner, loser] for _, winner, loser in found]
    gaps = score(both) if score is not None and found else np.zeros(len(found))
    for (place, winner, loser), gap in zip(found, gaps, strict=True):
        is_finite = all(np.isfinite(latent(sample.sample_id)).all() for sample in (winner, loser))
        if not is_finite or not np.isfinite(gap):
            paired.dropped_nan += 1
        elif score is not None and not gap > min_margin:
            paired.dropped_filter += 1
        else:
            pair = pair_against(
                loser,
                iteration,
                place,
                winner_id=winner.sample_id,
                winner_agent=winner.agent,
                judge=IMPROVER,
                margin=float(gap),
                source="improved",
            )
            paired.pairs.append(pair)
    return paired


def relative_distance(winner: Tensor, loser: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """How far improved images are from their losers, also as a share of the distance of unrelated images.

        distance = mean over pairs of mean((winner - loser)^2)
        relative = distance / mean over couples of prompts of mean((l - l')^2)

    Args:
        winner, loser: (N, ...) latents, or features, of the pairs.
        prompts: Of the pairs; losers of different prompts are unrelated.
    Returns:
        (distance, relative). Winners equal to their losers give (0, 0); winners that are other prompts'
        losers give a relative distance near 1. NaN where there is one prompt only.
    """
    winner, loser = winner.double().flatten(1), loser.double().flatten(1)
    distance = float((winner - loser).square().mean())
    numbers = {text: index for index, text in enumerate(dict.fromkeys(prompts))}
    names = torch.tensor([numbers[text] for text in prompts])
    apart = names[:, None] != names[None, :]
    if not bool(apart.any()):
        return distance, float("nan")
    unrelated = float((torch.cdist(loser, loser).square() / loser.shape[1])[apart].mean())
    return distance, distance / unrelated if unrelated > 0 else float("nan")


def gain_metrics(pairs: Sequence[Couple]) -> dict[str, float]:
    """For every reward the mean of winner minus loser and the share of winners above their loser (ties
    1/2)."""
    metrics: dict[str, float] = {}
    for name in pairs[0][1].scores if pairs else ():
        gaps = np.array([winner.scores[name] - loser.scores[name] for _, winner, loser in pairs])
        gaps = gaps[np.isfinite(gaps)]
        better = (gaps > 0) + 0.5 * (gaps == 0)
        metrics[f"improve/reward/{name}/gain"] = float(gaps.mean()) if gaps.size else float("nan")
        metrics[f"improve/reward/{name}/better"] = float(better.mean()) if gaps.size else float("nan")
    return metrics


def distance_warning(relative: float) -> str | None:
    """What a relative distance says of the improvement model, if it is alarming."""
    if relative < IDENTITY:
        return (
            f"improved images are nearly their losers (relative distance {relative:.3f}, expected above "
            f"{IDENTITY}): such pairs teach nothing; lower algorithm.improver.image_scale, raise text_scale, "
            "or train the improvement model longer"
        )
    if relative > UNRELATED:
        return (
            f"improved images have little to do with their losers (relative distance {relative:.3f}, "
            f"expected below {UNRELATED}): raise algorithm.improver.image_scale, raise the share of the task "
            "reconstruct, or train the improvement model longer"
        )
    return None
