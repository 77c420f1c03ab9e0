"""DDPO: policy gradients on the denoising steps, each step being one action of a Gaussian policy.

rho = exp(log_prob - old_log_prob)
score function: loss = -A log_prob,   importance sampling: loss = max(-A rho, -A clip(rho, 1 - c, 1 + c))

with log_prob the mean log density per latent element of one transition and A the sample's advantage. Source:
arXiv 2305.13301; conventions of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.transitions import TransitionMethod, ratio_values, replay_batch
from diffexpo.config.methods.ddpo import DdpoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import Policy, TrajectoryBatch

# exp overflows float32 at 88; a mean log-ratio of 20 per latent element is a broken policy long before.
LOG_RATIO_LIMIT = 20.0


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """How much likelier the policy makes a transition than the policy that drew it.

    rho = exp(clamp(log_prob - old_log_prob, -20, 20))

    Args:
        log_prob: (B,) mean log-probs per latent element under the policy.
        old_log_prob: (B,) those recorded when the transition was drawn; no gradient reaches them.
    Returns:
        (B,) between 2.1e-9 and 4.9e8. Equal log-probs (a replay) give exactly 1. Beyond the clamp the
        gradient is 0.
    Source: DDPO (arXiv 2305.13301), importance-sampling estimator. With the mean per element it is the true
        ratio to the power 1 / (C*H*W), as in the authors' code: the sum overflows. The clamp is ours.
    """
    gap = at_least_float32(log_prob) - at_least_float32(old_log_prob).detach()
    return torch.exp(gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def clipped_surrogate(ratio: Tensor, advantage: Tensor, *, clip_range: float) -> Tensor:
    """PPO's pessimistic objective of a ratio, max(-A rho, -A clip(rho, 1 - c, 1 + c)).

    Args:
        ratio: (B,) positive, of policy to sampling policy.
        advantage: (B,) finite; no gradient reaches it. The caller clips it (the papers: to +-5).
        clip_range: c > 0.
    Returns:
        (B,). Ratio 1 gives -advantage. The gradient is 0 where the ratio has already moved beyond the range
        in the direction of the advantage, and only there.
    Raises:
        ValueError: clip_range is not above 0.
    Source: PPO (arXiv 1707.06347) eq. 7.
    """
    check_above_zero("clipped_surrogate", clip_range=clip_range)
    ratio = at_least_float32(ratio)
    advantage = advantage.detach().to(ratio)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def ddpo_sf_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """DDPO's score-function loss of each transition, -A log_prob; for one update per set of samples.

    Args:
        log_prob: (B,) mean log-probs per latent element under the policy that also drew the samples.
        advantage: (B,) finite; no gradient reaches it.
    Returns:
        (B,). log_prob -0.5 and advantage 2 give 1. Only the gradient has a meaning.
    Source: DDPO (arXiv 2305.13301), score-function estimator, divided by C*H*W (mean instead of sum over
        elements).
    """
    log_prob = at_least_float32(log_prob)
    return -advantage.detach().to(log_prob) * log_prob


def ppo_clip_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float) -> Tensor:
    """DDPO's importance-sampling loss of each transition, `clipped_surrogate` of `probability_ratio`.

    Args:
        log_prob: (B,) mean log-probs per latent element under the policy.
        old_log_prob: (B,) those recorded when the transitions were drawn; no gradient reaches them.
        advantage: (B,) finite; no gradient reaches it. Of a group, this is GRPO's loss.
        clip_range: c > 0. 1e-4 of a mean is +-1.6 of the true log-ratio at 16,384 latent elements.
    Returns:
        (B,). On replay (equal log-probs) it is -advantage, with the gradient of `ddpo_sf_loss`.
    Raises:
        ValueError: clip_range is not above 0.
    Source: DDPO (arXiv 2305.13301), importance-sampling estimator with PPO's clipping (1707.06347 eq. 7), as
        in the authors' code; Flow-GRPO (2505.05470) uses the same.
    """
    return clipped_surrogate(probability_ratio(log_prob, old_log_prob), advantage, clip_range=clip_range)


class Ddpo(TransitionMethod):
    """DDPO on a `TrajectoryBatch`; guidance acts as in the rollout, with a gradient through both branches."""

    settings: DdpoConfig

    def row_losses(self, policy: Policy, batch: TrajectoryBatch) -> RowLosses:
        """DDPO's loss of each transition, by either estimator."""
        log_prob = replay_batch(policy, batch, "current").log_prob
        clip_range = self.settings.clip_range
        if self.settings.estimator == "score_function":
            per_row = ddpo_sf_loss(log_prob, batch.advantages)
        else:
            per_row = ppo_clip_loss(log_prob, batch.old_log_prob, batch.advantages, clip_range=clip_range)
        ratio = probability_ratio(log_prob, batch.old_log_prob)
        approx_kl = 0.5 * (log_prob - batch.old_log_prob).square()
        return per_row, ratio_values(ratio, clip_range=clip_range) | {"train/approx_kl": approx_kl}
