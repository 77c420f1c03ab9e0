"""Trajectories whose steps branch into candidates, of which best and worst become a pair (SPO).

    x_{t-1}^1 .. x_{t-1}^k ~ the step's kernel at x_t
    best and worst by score;   go on from a random one

A step-aware judge scores the candidates as they are, noise and all. Without one the run's rewards score the
image that each candidate's predicted x0 decodes to; the predictions are those that the next step needs, of
all candidates instead of one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.methods.data import Branches
from diffexpo.data.scored import Mix
from diffexpo.diffusion.kernels import mean_log_prob
from diffexpo.diffusion.path import Path
from diffexpo.diffusion.sampling import predict_guided
from diffexpo.diffusion.transitions import Transition, step_moments, stochastic_grid
from diffexpo.online.pairing import best_and_worst
from diffexpo.online.units import Drawing, Tick, Unit, noise_keys, unit_inputs
from diffexpo.rng import keyed_choice
from diffexpo.types import Drawn, StepJudge


@torch.no_grad()
def branch_unit(
    drawing: Drawing, unit: Unit, branches: Branches, judge: StepJudge | None, mix: Mix, tick: Tick
) -> dict[str, Tensor]:
    """Draw one unit with branched steps, with the weights in use.

    Args:
        judge: What scores noisy candidates; None: the run's rewards score the images of their predicted x0.
        mix: Scores by reward (B, k) to one score (B, k), NaN where a candidate has none; not called where
            there is a judge.
        tick: Called after every step.
    Returns:
        latents (T+1,B,C,h,w) and log_probs (T,B) of the path that was gone, and the R decided branches:
        branch_x_t, branch_winner, branch_loser (R,C,h,w), branch_log_probs and branch_scores (R,2), winner
        first, branch_index (R,) the step, branch_row (R,) the image of the unit.
    """
    policy, sampler, keys = drawing.policy, drawing.sampler, noise_keys(drawing, unit)
    grid = stochastic_grid(policy.path, sampler)
    conditioning, negative, noise = unit_inputs(drawing, unit)
    conditioning = conditioning.to(policy.device)
    negative = None if negative is None else negative.to(policy.device)

    def predict(x: Tensor, place: int) -> Tensor:
        return predict_guided(policy, x, grid[place].t, conditioning, negative, sampler.guidance)

    latents, log_probs = [noise.draw().to(policy.device)], []
    decided: list[dict[str, Tensor]] = []
    rows = torch.arange(len(keys))
    ready: Tensor | None = None
    for place, step in enumerate(grid):
        x = latents[-1]
        mean, std = step_moments(policy.path, step, predict(x, place) if ready is None else ready, x)
        ready = None
        is_branched = step.has_density and place >= branches.first_transition
        count = branches.num_candidates if is_branched else 1
        spread = std.reshape(-1, *[1] * (mean.ndim - 1))
        drawn = [mean + spread * noise.draw().to(mean) if step.has_density else mean for _ in range(count)]
        candidates = torch.stack(drawn)
        chosen = torch.zeros_like(rows)
        if is_branched:
            chosen = torch.tensor([keyed_choice(count, *key, "branch", place) for key in keys])
            if judge is not None:
                found = [judge.score(each, step.alpha_s, step.sigma_s, unit.prompts) for each in drawn]
                scores = torch.stack(found, dim=1).to(torch.float64)
            else:
                x0s = drawn
                if place + 1 < len(grid):
                    predictions = [predict(each, place + 1) for each in drawn]
                    ready = torch.stack(predictions)[chosen, rows]
                    both = zip(predictions, drawn, strict=True)
                    x0s = [_predicted_x0(policy.path, grid[place + 1], *each) for each in both]
                scores = _score(drawing, unit, x0s, mix)
            decided.append(_decided(place, x, candidates, mean, std, scores, branches.min_margin))
        latents.append(candidates[chosen, rows])
        log_probs.append(
            mean_log_prob(latents[-1], mean, std) if step.has_density else torch.zeros(len(keys)).to(mean)
        )
        tick()
    names = decided[0] if decided else ()
    pairs = {f"branch_{name}": torch.cat([part[name] for part in decided]) for name in names}
    return {"latents": torch.stack(latents), "log_probs": torch.stack(log_probs), **pairs}


def _predicted_x0(path: Path, step: Transition, prediction: Tensor, x_t: Tensor) -> Tensor:
    x0, _ = path.x0_eps_at(prediction, x_t, step.alpha_t, step.sigma_t)
    limit = path.clip_sample_range
    return x0 if limit is None else x0.clamp(-limit, limit)


def _score(drawing: Drawing, unit: Unit, x0s: list[Tensor], mix: Mix) -> Tensor:
    """Mixed scores (B, k)."""
    found = [drawing.score(Drawn(x0, drawing.policy.decode_latents(x0)), unit.prompts) for x0 in x0s]
    by_name = {name: np.stack([scores[name] for scores in found], axis=1) for name in found[0]}
    return torch.from_numpy(np.asarray(mix(by_name), dtype=np.float64))


def _decided(
    place: int, x_t: Tensor, candidates: Tensor, mean: Tensor, std: Tensor, scores: Tensor, min_margin: float
) -> dict[str, Tensor]:
    """The decided rows of one step."""
    best, worst, valid = best_and_worst(scores, min_margin)
    rows = valid.nonzero().flatten()
    # Log-probs of whole batches, as a replay computes them, then the rows.
    everyone = torch.arange(len(scores))
    both = [mean_log_prob(candidates[side, everyone], mean, std)[rows] for side in (best, worst)]
    return {
        "x_t": x_t[rows],
        "winner": candidates[best[rows], rows],
        "loser": candidates[worst[rows], rows],
        "log_probs": torch.stack(both, dim=1),
        "scores": torch.stack([scores[rows, best[rows]], scores[rows, worst[rows]]], dim=1),
        "index": torch.full((len(rows),), place),
        "row": rows,
    }
