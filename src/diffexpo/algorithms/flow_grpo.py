"""Flow-GRPO: PPO on the steps of a flow model's SDE, with advantages within the images of a prompt.

loss = ppo_clip_loss(log_prob, old_log_prob, group advantage) + beta KL

Here stand what it adds to `ppo_clip_loss`: its KL, GRPO-Guard's ratio and loss, and MixGRPO's window. Source:
arXiv 2505.05470, 2510.22319, 2507.21802; conventions of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffexpo.algorithms.ddpo import LOG_RATIO_LIMIT, clipped_surrogate, probability_ratio
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.transitions import TransitionMethod, replay_batch
from diffexpo.config.methods.flow_grpo import FlowGrpoConfig
from diffexpo.diffusion.kernels import Coefficient, at_least_float32, gaussian_kl
from diffexpo.diffusion.sampling import Replayed
from diffexpo.diffusion.transitions import Transition, sampler_transitions, transition_rows
from diffexpo.errors import DataError
from diffexpo.types import Policy, TrajectoryBatch


def flow_grpo_kl(
    mean: Tensor, mean_ref: Tensor, std: Coefficient, *, sigma: Coefficient, sigma_next: Coefficient
) -> Tensor:
    """Flow-GRPO's own KL of each transition: the exact KL per latent element times the step size.

    gaussian_kl(mean, mean_ref, std) (sigma - sigma_next) = mean over C,H,W of (mean - mean_ref)^2 / (2 g^2),
    g = std / sqrt(sigma - sigma_next)

    Args:
        mean, mean_ref: (B, ...) of the transition under policy and reference; no gradient reaches the
            reference.
        std: number or (B,), > 0, whole, of the very SDE that took the step (its rule at sigma 1 included).
        sigma, sigma_next: number or (B,), 1 >= sigma > sigma_next >= 0.
    Returns:
        (B,) non-negative; equal means give 0. `gaussian_kl` is the exact one: 4 to 112 times larger along ten
        steps with shift 3.
    Source: Flow-GRPO (arXiv 2505.05470) states the exact KL, with -dt inside the variance; the authors' code
        leaves it out, and their beta 0.04 or 0.01 belongs to that. For the kinds flow_grpo and dance.
    """
    exact = gaussian_kl(mean, mean_ref.detach(), std)
    return exact * _like(sigma - sigma_next, exact)


def guard_ratio(
    log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Coefficient
) -> Tensor:
    """GRPO-Guard's ratio, whose logarithm has mean 0 and the same scale at every step.

    rho = exp((log_prob - old_log_prob + b) std), b = mean over C,H,W of (mean - old_mean)^2 / (2 std^2)
        = exp(mean over C,H,W of (mean - old_mean) z), with z the noise that was drawn

    Args:
        log_prob: (B,) mean log-probs per latent element under the policy.
        old_log_prob: (B,) those recorded when the transitions were drawn; no gradient reaches them.
        mean, old_mean: (B, ...) of the transition under the policy, and as recorded; no gradient reaches the
            latter.
        std: number or (B,), > 0, whole (sqrt(-dt) is inside).
    Returns:
        (B,) between 2.1e-9 and 4.9e8 (the exponent is clamped at +-20). A replay gives exactly 1. The plain
        ratio is below 1 on average, so that its clip stops bad images more often than good ones; this one is
        not.
    Source: GRPO-Guard (arXiv 2510.22319) eq. 8. b and std are those of each sample; published scripts average
        them over the batch, which agrees only where all samples are at one step and for b not even there.
    """
    gap = at_least_float32(log_prob) - at_least_float32(old_log_prob).detach()
    exponent = (gap + gaussian_kl(mean, old_mean.detach(), std).to(gap)) * _like(std, gap)
    return torch.exp(exponent.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def guard_loss(
    ratio: Tensor, advantage: Tensor, *, sigma: Coefficient, sigma_next: Coefficient, clip_range: float
) -> Tensor:
    """GRPO-Guard's loss of each transition, `clipped_surrogate` of `guard_ratio` divided by the step size.

    max(-A rho, -A clip(rho, 1 - c, 1 + c)) / (sigma - sigma_next)

    Args:
        ratio: (B,) from `guard_ratio`.
        advantage: (B,) finite; no gradient reaches it.
        sigma, sigma_next: number or (B,), sigma > sigma_next. The transition's mean moves with the velocity
            in proportion to the step size, so the division gives every step the same pull.
        clip_range: c > 0 (2e-6: this ratio lies much nearer to 1 than the plain one).
    Returns:
        (B,). A replay gives -advantage / (sigma - sigma_next).
    Raises:
        ValueError: clip_range is not above 0.
    Source: GRPO-Guard (arXiv 2510.22319), with the weighting of the published code.
    """
    loss = clipped_surrogate(ratio, advantage, clip_range=clip_range)
    return loss / _like(sigma - sigma_next, loss)


def mix_grpo_window(
    step: int,
    *,
    num_transitions: int,
    window_size: int,
    shift_every: int = 25,
    stride: int = 1,
    wrap: bool = True,
) -> tuple[int, ...]:
    """Which transitions MixGRPO draws with noise and trains in one step; the others follow the ODE.

    start = stride (step // shift_every), at most num_transitions - window_size

    Args:
        step: Optimiser step, from 0.
        num_transitions: Denoising steps that have a density; 0 is the noisiest.
        window_size: Transitions trained at once, 1 to `num_transitions`.
        shift_every: Steps between two moves of the window, >= 1.
        stride: Transitions it moves by, >= 1; `window_size` leaves no overlap.
        wrap: After the last window, begin again at the noisiest (True) or stay (False).
    Returns:
        `window_size` consecutive indices. step 0 gives 0 .. window_size - 1.
    Raises:
        ValueError: a count is out of range.
    Source: MixGRPO (arXiv 2507.21802), progressive strategy. The published code lets the window shrink, and
        for a while be empty, at the end of the schedule; here it is always whole.
    """
    if step < 0:
        raise ValueError(f"mix_grpo_window: step is {step}; expected 0 or more")
    for name, value in (("window_size", window_size), ("shift_every", shift_every), ("stride", stride)):
        if value < 1:
            raise ValueError(f"mix_grpo_window: {name} is {value}; expected 1 or more")
    if window_size > num_transitions:
        raise ValueError(
            f"mix_grpo_window: window_size is {window_size}, but there are {num_transitions} transitions; "
            "expected at most that"
        )
    last = num_transitions - window_size
    moves = step // shift_every
    windows = -(-last // stride) + 1
    start = min(stride * (moves % windows if wrap else moves), last)
    return tuple(range(start, start + window_size))


class FlowGrpo(TransitionMethod):
    """Flow-GRPO on a `TrajectoryBatch`; guidance acts as in the rollout, without a gradient in its negative
    branch."""

    settings: FlowGrpoConfig

    def random_steps(self, iteration: int, num_transitions: int) -> tuple[int, int] | None:
        """First and one past the last step that an iteration (from 1) draws with noise and trains; None:
        all."""
        if self.settings.window is None:
            return None
        window = mix_grpo_window(
            iteration - 1,
            num_transitions=num_transitions,
            window_size=self.settings.window,
            shift_every=self.settings.window_every,
        )
        return window[0], window[-1] + 1

    def row_losses(self, policy: Policy, batch: TrajectoryBatch) -> RowLosses:
        """Policy loss plus weighted KL of each transition."""
        current = replay_batch(policy, batch, "current", is_negative_fixed=True)
        step = transition_rows(sampler_transitions(policy.path, batch.sampler), batch.index)
        ratio, per_row = self._policy_loss(batch, current, step)
        values = {
            "train/ratio": ratio,
            "train/clip_fraction_high": (ratio > 1 + self.settings.clip_range).to(ratio),
            "train/clip_fraction_low": (ratio < 1 - self.settings.clip_range).to(ratio),
        }
        if self.settings.needs_reference:
            kl = self._kl(current, replay_batch(policy, batch, "reference"), step)
            per_row = per_row + self.settings.kl_weight * kl
            values["train/reference_kl"] = kl
        return per_row, values

    def _policy_loss(
        self, batch: TrajectoryBatch, current: Replayed, step: Transition
    ) -> tuple[Tensor, Tensor]:
        """(ratio (B,), loss (B,))."""
        clip_range = self.settings.clip_range
        if self.settings.ratio == "plain":
            ratio = probability_ratio(current.log_prob, batch.old_log_prob)
            return ratio, clipped_surrogate(ratio, batch.advantages, clip_range=clip_range)
        if batch.old_mean is None:
            raise DataError(
                "flow_grpo with ratio guard: the batch has no old_mean; expected the rollout's means"
            )
        ratio = guard_ratio(current.log_prob, batch.old_log_prob, current.mean, batch.old_mean, current.std)
        loss = guard_loss(
            ratio, batch.advantages, sigma=step.sigma_t, sigma_next=step.sigma_s, clip_range=clip_range
        )
        return ratio, loss

    def _kl(self, current: Replayed, reference: Replayed, step: Transition) -> Tensor:
        if self.settings.kl == "exact":
            return gaussian_kl(current.mean, reference.mean, current.std)
        return flow_grpo_kl(
            current.mean, reference.mean, current.std, sigma=step.sigma_t, sigma_next=step.sigma_s
        )


def _like(value: Coefficient, like: Tensor) -> Coefficient:
    """A number as it is; a tensor on the device and in the precision of the losses."""
    return value.to(like) if isinstance(value, Tensor) else value
