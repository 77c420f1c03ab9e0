"""Advantage-weighted matching: a policy gradient whose log-probability is minus the model's training loss.
Source: arXiv 2509.25050; conventions of the authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_known
from diffexpo.algorithms.ddpo import ppo_clip_loss, probability_ratio
from diffexpo.algorithms.forward import RowLosses, Rows, squared_distance
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.config.methods.awm import AwmConfig
from diffexpo.diffusion.kernels import Coefficient, at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import Policy, ScoredBatch

Weighting = Literal["uniform", "t", "t_squared", "huber", "ghuber"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
# Keeps the slope of a power below 1 finite where the error is 0.
SOFTENING = 1e-10


def awm_loss(
    error: Tensor,
    error_old: Tensor,
    advantage: Tensor,
    t: Coefficient,
    *,
    clip_range: float,
    weighting: Weighting = "uniform",
    power: float = 0.25,
) -> Tensor:
    """Clipped policy-gradient loss of each sample at one noise and time, `ppo_clip_loss` of `awm_log_prob`.

    max(-A rho, -A clip(rho, 1 - c, 1 + c)),   rho = exp(awm_log_prob(error) - awm_log_prob(error_old))

    Args:
        error: (B,) mean squared prediction errors of the policy, in the model's native space.
        error_old: (B,) those of the policy before the update at the same noise and time; no gradient reaches
            them. On-policy it is `error` itself.
        advantage: (B,) A, clipped by the caller; no gradient reaches it.
        t: number or (B,) in [0, 1], 1 is noise; uniform weighting ignores it.
        clip_range: c > 0.
        weighting, power: See `awm_log_prob`.
    Returns:
        (B,). error = error_old gives -A, with the gradient of A times the weighted error. Without the KL
        term. The log of the ratio is held within +-20, where the gradient ends.
    Raises:
        ValueError: clip_range, weighting or power out of range.
    Source: Advantage Weighted Matching (arXiv 2509.25050), authors' code, `loss_type` exp_first: a ratio for
        each time, not one for the mean over times.
    """
    log_prob, old_log_prob = (
        awm_log_prob(e, t, weighting=weighting, power=power) for e in (error, error_old)
    )
    return ppo_clip_loss(log_prob, old_log_prob, advantage, clip_range=clip_range)


def awm_log_prob(
    error: Tensor, t: Coefficient, *, weighting: Weighting = "uniform", power: float = 0.25
) -> Tensor:
    """What stands for log p(x0 | c) in advantage-weighted matching: minus the weighted error.

    uniform    -e                       huber   -t [sqrt(e + d) - sqrt(d)]               d = 1e-10
    t          -t e                     ghuber  -t [(e + d)^power - d^power] / power
    t_squared  -t^2 e

    Args:
        error: (B,) mean squared prediction errors, >= 0.
        t: number or (B,) in [0, 1], 1 is noise; uniform ignores it.
        weighting: By time, and by size: a power below 1 lets large errors count less.
        power: In (0, 1], of ghuber alone. 1/2 is twice huber, 1 is t.
    Returns:
        (B,), not positive. Error 0 gives 0.
    Raises:
        ValueError: weighting or power out of range.
    Source: Advantage Weighted Matching (arXiv 2509.25050) and its authors' code (`weighting`).
    """
    check_known("awm", WEIGHTINGS, weighting=weighting)
    if not 0 < power <= 1:
        raise ValueError(f"awm: power is {power}; expected 0 < power <= 1")
    error = at_least_float32(error)
    if weighting == "uniform":
        return -error
    t = torch.as_tensor(t, dtype=error.dtype, device=error.device)
    if weighting == "t":
        return -t * error
    if weighting == "t_squared":
        return -(t**2) * error
    if weighting == "huber":
        return -t * _softened_power(error, 0.5)
    return -t * _softened_power(error, power) / power


def _softened_power(error: Tensor, power: float) -> Tensor:
    return (error + SOFTENING).pow(power) - SOFTENING**power


class Awm(ScoredMethod):
    """Advantage-weighted matching on a `ScoredBatch` of images that the old policy drew."""

    settings: AwmConfig

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """awm_loss + kl_weight * mean (v - v_ref)^2 of each image."""
        settings = self.settings
        weighting, power, clip_range = settings.weighting, settings.power, settings.clip_range
        current = images.predict_under(policy, "current")
        error, error_old = images.error(current), images.error_under(policy, "old")
        advantage = batch.advantages.clamp(-settings.advantage_clip, settings.advantage_clip)
        loss = awm_loss(
            error, error_old, advantage, images.t, clip_range=clip_range, weighting=weighting, power=power
        )
        log_prob, old_log_prob = (
            awm_log_prob(e.detach(), images.t, weighting=weighting, power=power) for e in (error, error_old)
        )
        moved = probability_ratio(log_prob, old_log_prob) - 1
        # Beyond the range in the direction in which the advantage pushes: there the gradient ends.
        is_clipped = torch.where(advantage > 0, moved, -moved) > clip_range
        values: dict[str, Rows] = {
            "train/ratio_deviation": moved.abs(),
            "train/clip_fraction": (is_clipped & (advantage != 0)).to(moved),
            "train/better_error": (error, advantage > 0),
            "train/worse_error": (error, advantage < 0),
        }
        if settings.needs_reference:
            distance = squared_distance(current, images.predict_under(policy, "reference"))
            values["train/reference_distance"] = distance
            loss = loss + settings.kl_weight * distance
        return loss, values
