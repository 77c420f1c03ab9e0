"""Trajectories whose steps branch into candidates, of which best and worst become a pair (SPO).

    x_{t-1}^1 .. x_{t-1}^k ~ the step's kernel at x_t
    best and worst by score;   go on from a random one

A step-aware judge scores the candidates as they are, noise and all. Without one the run's rewards score the
image that each candidate's predicted x0 decodes to; the predictions are those that the next step needs, of
all candidates instead of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.methods.data import Branches
from diffexpo.diffusion.kernels import mean_log_prob
from diffexpo.diffusion.sampling import predict_guided
from diffexpo.diffusion.transitions import Transition, step_moments, stochastic_grid
from diffexpo.online.pairing import best_and_worst
from diffexpo.online.units import Drawing, Tick, Unit, guidance_of, noise_of, plain_texts, unit_inputs
from diffexpo.rng import keyed_choice
from diffexpo.types import Drawn, StepJudge

Mix = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass
class _Pairs:
    """What the branches of one unit gave, a list entry a step."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.parts.setdefault(f"branch_{name}", []).append(tensor)

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


@torch.no_grad()
def branch_unit(
    drawing: Drawing, unit: Unit, branches: Branches, judge: StepJudge | None, mix: Mix, tick: Tick
) -> dict[str, Tensor]:
    """Draw one unit with branched steps, with the weights in use.

    Args:
        drawing, unit, tick: As for any unit; ticks are one a step.
        branches: How steps branch.
        judge: What scores noisy candidates; None: the run's rewards score the images of their predicted x0.
        mix: Scores by reward (B, k) to one score (B, k), NaN where a candidate has none; not called where
            there is a judge.
    Returns:
        latents (T+1,B,C,h,w) and log_probs (T,B) of the path that was gone, and the R decided branches:
        branch_x_t, branch_winner, branch_loser (R,C,h,w), branch_log_probs and branch_scores (R,2), winner
        first, branch_index (R,) the step, branch_row (R,) the image of the unit.
    """
    keys, texts, negatives = unit_inputs(drawing, unit)
    policy, sampler = drawing.policy, drawing.sampler
    grid = stochastic_grid(policy.path, sampler)
    conditioning = drawing.embeddings.select(texts).to(policy.device)
    negative = guidance_of(drawing.embeddings, sampler, negatives)
    negative = None if negative is None else negative.to(policy.device)

    def predict(x: Tensor, place: int) -> Tensor:
        return predict_guided(policy, x, grid[place].t, conditioning, negative, sampler.guidance)

    noise = noise_of(policy, keys, unit.bucket)
    latents, log_probs, pairs = [noise.draw().to(policy.device)], [], _Pairs()
    rows = torch.arange(len(keys))
    ready: Tensor | None = None
    for place, step in enumerate(grid):
        x = latents[-1]
        mean, std = step_moments(policy.path, step, predict(x, place) if ready is None else ready, x)
        ready = None
        is_branched = step.has_density and place >= branches.first_transition
        count = branches.num_candidates if is_branched else 1
        shape = (-1, *[1] * (mean.ndim - 1))
        drawn = [
            mean + std.reshape(shape) * noise.draw().to(mean) if step.has_density else mean
            for _ in range(count)
        ]
        candidates = torch.stack(drawn)
        chosen = torch.zeros_like(rows)
        if is_branched:
            predictions: list[Tensor] = []
            if judge is not None:
                scores = _judge(judge, step, drawn, plain_texts(unit))
            else:
                has_next = place + 1 < len(grid)
                predictions = [predict(x_next, place + 1) for x_next in drawn] if has_next else []
                x0s = _predicted_x0(drawing, grid, place, drawn, predictions)
                scores = _score(drawing, unit, x0s, mix)
            _keep(pairs, place, x, candidates, mean, std, scores, branches.min_margin)
            chosen = torch.tensor([keyed_choice(count, *key, "branch", place) for key in keys])
            if predictions:
                ready = torch.stack(predictions)[chosen, rows]
        latents.append(candidates[chosen, rows])
        has_density = step.has_density
        log_probs.append(
            mean_log_prob(latents[-1], mean, std) if has_density else torch.zeros(len(keys)).to(mean)
        )
        tick()
    path = {"latents": torch.stack(latents), "log_probs": torch.stack(log_probs)}
    return path | pairs.tensors()


def _judge(judge: StepJudge, step: Transition, candidates: list[Tensor], prompts: list[str]) -> Tensor:
    """Scores (B, k) of the candidates at the noise level that the step leads to."""
    found = [judge.score(candidate, step.alpha_s, step.sigma_s, prompts) for candidate in candidates]
    return torch.stack(found, dim=1).to(torch.float64)


def _predicted_x0(
    drawing: Drawing,
    grid: list[Transition],
    place: int,
    candidates: list[Tensor],
    predictions: list[Tensor],
) -> list[Tensor]:
    """What each candidate will become; after the last step it is the image itself."""
    if not predictions:
        return candidates
    path, following = drawing.policy.path, grid[place + 1]
    found = []
    for candidate, prediction in zip(candidates, predictions, strict=True):
        x0, _ = path.x0_eps_at(prediction, candidate, following.alpha_t, following.sigma_t)
        limit = path.clip_sample_range
        found.append(x0 if limit is None else x0.clamp(-limit, limit))
    return found


def _score(drawing: Drawing, unit: Unit, x0s: list[Tensor], mix: Mix) -> Tensor:
    """Mixed scores (B, k)."""
    prompts = plain_texts(unit)
    found = [drawing.score(Drawn(x0, drawing.policy.decode_latents(x0)), prompts) for x0 in x0s]
    by_name = {name: np.stack([scores[name] for scores in found], axis=1) for name in found[0]}
    return torch.from_numpy(np.asarray(mix(by_name), dtype=np.float64))


def _keep(
    pairs: _Pairs,
    place: int,
    x_t: Tensor,
    candidates: Tensor,
    mean: Tensor,
    std: Tensor,
    scores: Tensor,
    min_margin: float,
) -> None:
    """Add the decided rows of one step."""
    best, worst, valid = best_and_worst(scores, min_margin)
    rows = valid.nonzero().flatten()
    winner, loser = candidates[best[rows], rows], candidates[worst[rows], rows]
    # Log-probs of whole batches, as a replay computes them, then the rows.
    everyone = torch.arange(len(scores))
    both = [mean_log_prob(candidates[side, everyone], mean, std)[rows] for side in (best, worst)]
    pairs.add(
        x_t=x_t[rows],
        winner=winner,
        loser=loser,
        log_probs=torch.stack(both, dim=1),
        scores=torch.stack([scores[rows, best[rows]], scores[rows, worst[rows]]], dim=1),
        index=torch.full((len(rows),), place),
        row=rows,
    )
