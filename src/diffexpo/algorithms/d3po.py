"""D3PO: preferences between two trajectories, applied to each of their denoising steps. Source: arXiv
2311.13231; conventions of the authors' code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses, share_above_zero
from diffexpo.algorithms.transitions import TransitionMethod, is_clipped, preference_log_probs
from diffexpo.config.methods.d3po import D3poConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import Policy, TrajectoryPairBatch


def transition_margin(
    winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, *, beta: float, clip_range: float
) -> Tensor:
    """Logit of a preference between two transitions, beta (log rho_w - log rho_l) with clipped ratios.

    log rho = clip(log_prob - log_prob_ref, log(1 - c), log(1 + c)), which is the log of rho clipped to 1 +- c

    Args:
        winner, loser: (B,) mean log-probs per latent element of the two transitions under the policy.
        winner_ref, loser_ref: (B,) those under the reference; no gradient reaches them.
        beta: > 0; multiplies a mean log-ratio, which is of the order of 1e-3.
        clip_range: c in (0, 1).
    Returns:
        (B,), positive where the policy has moved towards the winner, at most beta log((1 + c) / (1 - c)) in
        size. Policy = reference gives 0. A ratio outside the range gets no gradient, on either side.
    Raises:
        ValueError: beta or clip_range out of range.
    Source: D3PO (arXiv 2311.13231) and SPO (2406.04314), with the clip of their code. Clipping the log-ratio
        needs no exp and so cannot overflow.
    """
    check_above_zero("transition_margin", beta=beta)
    if not 0 < clip_range < 1:
        raise ValueError(f"transition_margin: clip_range is {clip_range}; expected 0 < c < 1")
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    winner, loser, winner_ref, loser_ref = map(at_least_float32, (winner, loser, winner_ref, loser_ref))
    winner_gap = (winner - winner_ref.detach()).clamp(low, high)
    loser_gap = (loser - loser_ref.detach()).clamp(low, high)
    return beta * (winner_gap - loser_gap)


def d3po_loss(
    winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, *, beta: float, clip_range: float
) -> Tensor:
    """D3PO's loss of each pair of transitions, -log sigmoid of `transition_margin`.

    Args:
        winner, loser: (B,) mean log-probs per latent element under the policy: the same step of the preferred
            and of the other trajectory of one prompt. Decided pairs only: a tie is a constant ln 2 without
            gradient.
        winner_ref, loser_ref: (B,) those under the reference; no gradient reaches them.
        beta: > 0 (the code: 0.1).
        clip_range: c in (0, 1) (the code: 0.1).
    Returns:
        (B,). Policy = reference gives ln 2 = 0.6931472.
    Raises:
        ValueError: beta or clip_range out of range.
    Source: D3PO (arXiv 2311.13231), loss of one step, with the clip of the authors' code; logsigmoid for
        their log(sigmoid).
    """
    margin = transition_margin(winner, loser, winner_ref, loser_ref, beta=beta, clip_range=clip_range)
    return -logsigmoid(margin)


class D3po(TransitionMethod):
    """D3PO on a `TrajectoryPairBatch`; guidance acts as in the rollout, with a gradient through both
    branches."""

    settings: D3poConfig

    def row_losses(self, policy: Policy, batch: TrajectoryPairBatch) -> RowLosses:
        """D3PO's loss of each pair of transitions."""
        beta, clip_range = self.settings.beta, self.settings.clip_range
        winner, loser, winner_ref, loser_ref = four = preference_log_probs(policy, batch)
        margin = transition_margin(*four, beta=beta, clip_range=clip_range)
        both = torch.cat([winner - winner_ref, loser - loser_ref]).detach()
        return d3po_loss(*four, beta=beta, clip_range=clip_range), {
            "train/implicit_accuracy": share_above_zero(margin),
            "train/margin": margin,
            "train/clip_fraction": is_clipped(both, clip_range),
        }
