"""SPO: preferences between candidates of one denoising step, all drawn from the same x_t.

loss = -log sigmoid(beta (log rho_w - log rho_l)),   log rho clipped as in D3PO

The loss is D3PO's; what differs is the pair: best and worst of n candidates x_{t-1} under a step-aware
preference model, instead of two whole trajectories. Source: arXiv 2406.04314; conventions of the authors'
code.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.d3po import transition_margin
from diffexpo.algorithms.forward import RowLosses, share_above_zero
from diffexpo.algorithms.transitions import TransitionMethod, preference_log_probs
from diffexpo.config.methods.spo import SpoConfig
from diffexpo.types import Policy, TrajectoryPairBatch


def spo_loss(
    winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, *, beta: float, clip_range: float
) -> Tensor:
    """SPO's loss of each pair of candidates, -log sigmoid of `transition_margin`.

    Args:
        winner, loser: (B,) mean log-probs per latent element under the policy of the best and the worst
            candidate x_{t-1} of the same x_t. Decided pairs only (`spo_min_margin`).
        winner_ref, loser_ref: (B,) those under the reference; no gradient reaches them.
        beta: > 0 (the code: 10).
        clip_range: c in (0, 1) (the code: 0.1).
    Returns:
        (B,). Policy = reference gives ln 2 = 0.6931472.
    Raises:
        ValueError: beta or clip_range out of range.
    Source: SPO (arXiv 2406.04314), step-aware preference loss, with the clip of the authors' code; logsigmoid
        for their log(sigmoid), which underflows.
    """
    margin = transition_margin(winner, loser, winner_ref, loser_ref, beta=beta, clip_range=clip_range)
    return -logsigmoid(margin)


def spo_min_margin(threshold: float) -> float:
    """Smallest gap of scores for which SPO keeps a pair, 2 atanh(threshold).

    Args:
        threshold: Demanded gap of the softmax over the best and the worst score, in [0, 1).
    Returns:
        The gap in units of the scores, for `best_and_worst(scores, min_margin)`; 0.3 gives 0.6190392.
    Raises:
        ValueError: threshold out of range.
    Source: SPO (arXiv 2406.04314), the authors' code: softmax(s)_w - softmax(s)_l = tanh((s_w - s_l) / 2).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"spo_min_margin: threshold is {threshold}; expected 0 <= threshold < 1")
    return 2 * math.atanh(threshold)


class Spo(TransitionMethod):
    """SPO on a `TrajectoryPairBatch` whose pairs branch from a shared x_t; guidance acts as in the
    rollout."""

    settings: SpoConfig

    def row_losses(self, policy: Policy, batch: TrajectoryPairBatch) -> RowLosses:
        """SPO's loss of each pair of candidates."""
        beta, clip_range = self.settings.beta, self.settings.clip_range
        winner, loser, winner_ref, loser_ref = four = preference_log_probs(policy, batch)
        margin = transition_margin(*four, beta=beta, clip_range=clip_range)
        return spo_loss(*four, beta=beta, clip_range=clip_range), {
            "train/implicit_accuracy": share_above_zero(margin),
            "train/margin": margin,
            "train/ratio_winner": (winner - winner_ref).exp(),
            "train/ratio_loser": (loser - loser_ref).exp(),
        }
