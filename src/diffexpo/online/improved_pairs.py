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

from diffexpo.data.rows import Pair, Sample
from diffexpo.online.pairing import PairingReport
from diffexpo.training.engine import Engine
from diffexpo.types import Policy

SOURCE, JUDGE, IMPROVER = "improved", "improver", "improver"
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
class ImprovedReport(PairingReport):
    """What pairing kept and dropped; `dropped_filter` are pairs that the rewards did not agree with."""

    dropped_filter: int = 0

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.kept} pairs of {self.groups} prompts ({self.dropped_filter} that the rewards did not "
            f"agree with, {self.dropped_nan} without finite latents or scores)"
        )

    def metrics(self) -> dict[str, float]:
        """As of every pairing, with the share that passed the filter."""
        judged = max(self.kept + self.dropped_filter, 1)
        return super().metrics() | {
            "pairs/dropped_filter": self.dropped_filter,
            "pairs/filter_agrees": self.kept / judged,
        }


def couples(groups: Sequence[Sequence[Sample]]) -> list[tuple[int, Sample, Sample]]:
    """(group, winner, loser) of every improved image, in the order of the groups."""
    found = []
    for index, samples in enumerate(groups):
        by_id = {sample.sample_id: sample for sample in samples}
        found += [
            (index, sample, by_id[sample.improved_from])
            for sample in samples
            if sample.improved_from is not None
        ]
    return found


def make_improved_pairs(
    groups: Sequence[Sequence[Sample]],
    latent: Callable[[str], np.ndarray],
    *,
    iteration: int,
    score: Callable[[Sequence[Sequence[Sample]]], np.ndarray] | None = None,
    min_margin: float = 0.0,
) -> tuple[list[Pair], ImprovedReport]:
    """Pairs of one iteration, one for each improved image.

    Args:
        groups: Samples of each request, those of the model and those of the improver.
        latent: Latents of a sample by id; a pair with one that is not finite is dropped and counted.
        iteration: Names the pairs.
        score: Gaps (P,) between winner and loser of P couples of samples; None keeps all.
        min_margin: With `score`, the gap must exceed it.
    Returns:
        (pairs, report). The margin is the gap, or 0 without `score`.
    """
    found = couples(groups)
    report = ImprovedReport(groups=len(groups))
    gaps = np.zeros(len(found))
    if score is not None and found:
        gaps = score([[winner, loser] for _, winner, loser in found])
    pairs: list[Pair] = []
    counts: dict[int, int] = {}
    for (group, winner, loser), gap in zip(found, gaps, strict=True):
        place = counts[group] = counts.get(group, -1) + 1
        is_finite = all(np.isfinite(latent(sample.sample_id)).all() for sample in (winner, loser))
        if not is_finite or not np.isfinite(gap):
            report.dropped_nan += 1
        elif score is not None and not gap > min_margin:
            report.dropped_filter += 1
        else:
            pairs.append(
                _pair(winner, loser, f"pair-{iteration:04d}-{group:06d}-{place:02d}", iteration, float(gap))
            )
            report.margins.append(float(gap))
    report.kept = len(pairs)
    report.winner_from = {IMPROVER: len(pairs)}
    report.loser_from = {"exploration": len(pairs)}
    return pairs, report


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


def gain_metrics(pairs: Sequence[tuple[int, Sample, Sample]]) -> dict[str, float]:
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


def _pair(winner: Sample, loser: Sample, name: str, iteration: int, margin: float) -> Pair:
    return Pair(
        pair_id=name,
        iteration=iteration,
        prompt_id=winner.prompt_id,
        prompt=winner.prompt,
        winner_id=winner.sample_id,
        loser_id=loser.sample_id,
        judge=JUDGE,
        margin=margin,
        source=SOURCE,
        winner_agent=winner.agent,
        loser_agent=loser.agent,
    )
