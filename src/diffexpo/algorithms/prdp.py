"""PRDP: let the log-ratios of two trajectories predict the difference of their rewards. Experimental.

d = beta sum_t [log p/p_ref of the first trajectory's step - that of the second's]
loss = max((d - (r_1 - r_2))^2, (d_clip - (r_1 - r_2))^2)

d_clip is d with every step's log-prob held within +-c of the policy that drew the trajectories. Source: arXiv
2402.08714; there is no code of the authors, and its numbers have not been reproduced here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses, share_above_zero
from diffexpo.algorithms.transitions import TransitionMethod, by_step, pair_log_probs, steps_of_pairs
from diffexpo.config.methods.prdp import PrdpConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import Policy, TrajectoryPairBatch


def predicted_reward_difference(
    first: Tensor, second: Tensor, first_ref: Tensor, second_ref: Tensor, *, beta: float
) -> Tensor:
    """Difference of the rewards that the policy implies for two trajectories of one prompt.

    d = beta sum_t [(first_t - first_ref_t) - (second_t - second_ref_t)]

    Args:
        first, second: (T, B) mean log-probs per latent element of the T transitions under the policy; a step
            without density stands as 0 everywhere.
        first_ref, second_ref: (T, B) those under the reference; no gradient reaches them.
        beta: > 0. The paper sums over elements: its beta times C*H*W is this one.
    Returns:
        (B,) in units of the reward. Policy = reference gives 0.
    Raises:
        ValueError: beta is not above 0.
    Source: PRDP (arXiv 2402.08714), reward difference prediction.
    """
    check_above_zero("predicted_reward_difference", beta=beta)
    first, second, first_ref, second_ref = map(at_least_float32, (first, second, first_ref, second_ref))
    gap = (first - first_ref.detach()) - (second - second_ref.detach())
    return beta * gap.sum(dim=0)


# Many parameters because each is a term of the formula.
def prdp_loss(
    first: Tensor,
    second: Tensor,
    first_ref: Tensor,
    second_ref: Tensor,
    first_old: Tensor,
    second_old: Tensor,
    first_reward: Tensor,
    second_reward: Tensor,
    *,
    beta: float,
    clip_range: float,
) -> Tensor:
    """PRDP's loss of each pair of trajectories, the larger of the plain and the clipped squared error.

    error(a, b) = (predicted_reward_difference(a, b) - (first_reward - second_reward))^2
    loss = max(error(first, second), error(clip(first), clip(second))),
    clip(log_prob) = old + clamp(log_prob - old, -c, c)

    Args:
        first, second: (T, B) mean log-probs per latent element of two trajectories of one prompt, under the
            policy. Neither has to be the better one; of K samples, take all pairs.
        first_ref, second_ref: (T, B) under the reference; no gradient reaches them.
        first_old, second_old: (T, B) recorded when the trajectories were drawn; no gradient reaches them.
        first_reward, second_reward: (B,) of the images they ended in.
        beta: > 0. The paper sums over elements: its beta times C*H*W is this one.
        clip_range: c > 0, on the mean log-ratio of one step.
    Returns:
        (B,) non-negative. Policy = reference gives (first_reward - second_reward)^2. Steps that have moved
        beyond the range get a gradient only if that move made the prediction worse.
    Raises:
        ValueError: beta or clip_range is not above 0.
    Source: PRDP (arXiv 2402.08714), reward difference prediction with proximal updates. The unit of the clip
        (mean log-ratio) is ours.
    """
    check_above_zero("prdp_loss", clip_range=clip_range)
    plain = predicted_reward_difference(first, second, first_ref, second_ref, beta=beta)
    held = predicted_reward_difference(
        _held(first, first_old, clip_range),
        _held(second, second_old, clip_range),
        first_ref,
        second_ref,
        beta=beta,
    )
    target = (at_least_float32(first_reward) - at_least_float32(second_reward)).detach().to(plain)
    return torch.maximum((plain - target).square(), (held - target).square())


def _held(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> Tensor:
    """The log-prob, kept within the range around what it was when the trajectory was drawn."""
    old = at_least_float32(old_log_prob).detach()
    return old + (at_least_float32(log_prob) - old).clamp(-clip_range, clip_range)


class Prdp(TransitionMethod):
    """PRDP on a grouped `TrajectoryPairBatch`: the rows of a group are all steps of one pair of
    trajectories."""

    settings: PrdpConfig

    def weights(self, batch: TrajectoryPairBatch) -> Tensor | None:
        """Weights (P,) of the pairs of trajectories."""
        return None if batch.weight is None else by_step(batch.weight, steps_of_pairs(batch))[0]

    def row_losses(self, policy: Policy, batch: TrajectoryPairBatch) -> RowLosses:
        """PRDP's loss (P,) of each pair of trajectories."""
        beta, clip_range = self.settings.beta, self.settings.clip_range
        steps = steps_of_pairs(batch)
        current = [by_step(log_prob, steps) for log_prob in pair_log_probs(policy, batch, "current")]
        reference = [by_step(log_prob, steps) for log_prob in pair_log_probs(policy, batch, "reference")]
        old = [by_step(log_prob, steps) for log_prob in (batch.winner_old_log_prob, batch.loser_old_log_prob)]
        rewards = [by_step(reward, steps)[0] for reward in (batch.winner_reward, batch.loser_reward)]
        difference = predicted_reward_difference(*current, *reference, beta=beta)
        agreement = difference * torch.sign(rewards[0] - rewards[1])
        moved = torch.cat([now - before for now, before in zip(current, old, strict=True)]).abs()
        return prdp_loss(*current, *reference, *old, *rewards, beta=beta, clip_range=clip_range), {
            "train/predicted_difference": agreement,
            "train/implicit_accuracy": share_above_zero(agreement),
            "train/clip_fraction": (moved > clip_range).to(moved).mean(dim=0),
        }
