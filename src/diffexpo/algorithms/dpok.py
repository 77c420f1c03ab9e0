"""DPOK: policy gradients on the denoising steps with a learned baseline and a KL to the reference.

loss = -w A clip(rho, 1 - c, 1 + c) + k KL,   A = r - V(x_t, prompt, t),   V fitted to r

with rho = exp(log_prob - old_log_prob) of one transition. Source: arXiv 2305.16381; conventions of the
authors' code.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from diffexpo.algorithms.checks import check_above_zero, check_known
from diffexpo.algorithms.ddpo import probability_ratio
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.transitions import TransitionMethod, ratio_values, replay_batch
from diffexpo.config.methods.dpok import DpokConfig
from diffexpo.diffusion.kernels import Coefficient, at_least_float32, gaussian_kl, prediction_error
from diffexpo.diffusion.sampling import Replayed
from diffexpo.diffusion.transitions import sampler_transitions, transition_rows
from diffexpo.types import Conditioning, Policy, TrajectoryBatch

KlKind = Literal["eps_mse", "gaussian"]
# Units in each hidden layer of the baseline.
VALUE_WIDTH = 256


def dpok_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float
) -> Tensor:
    """DPOK's policy loss of each transition, -A clip(rho, 1 - c, 1 + c).

    Args:
        log_prob: (B,) mean log-probs per latent element under the policy.
        old_log_prob: (B,) those recorded when the transitions were drawn; no gradient reaches them.
        advantage: (B,) finite, reward minus baseline; no gradient reaches it.
        clip_range: c > 0.
    Returns:
        (B,). On replay it is -advantage. There is no maximum with the unclipped term: outside the range the
        gradient is 0 in both directions, so a ratio that has left it on the wrong side is not brought back.
    Raises:
        ValueError: clip_range is not above 0.
    Source: DPOK (arXiv 2305.16381), importance-sampled policy gradient with the clipping of the authors'
        code; their factor 100 on this term is a weight of the caller.
    """
    check_above_zero("dpok_policy_loss", clip_range=clip_range)
    ratio = probability_ratio(log_prob, old_log_prob)
    return -advantage.detach().to(ratio) * ratio.clamp(1 - clip_range, 1 + clip_range)


def dpok_value_loss(value: Tensor, reward: Tensor) -> Tensor:
    """Squared error of the learned baseline, (V - r)^2.

    Args:
        value: (B,) the value network's output for (x_t, prompt, t).
        reward: (B,) of the image that the trajectory ended in; no gradient reaches it.
    Returns:
        (B,) non-negative; 0 where the baseline is the reward. Its minimiser is the mean reward given
        (x_t, prompt, t).
    Source: DPOK (arXiv 2305.16381), value function learning; the division by the number of value steps in the
        authors' code is a matter of the caller.
    """
    value = at_least_float32(value)
    return (value - reward.detach().to(value)).square()


def dpok_kl(
    policy: Tensor, reference: Tensor, *, kind: KlKind = "eps_mse", std: Coefficient | None = None
) -> Tensor:
    """DPOK's regulariser of each transition, per latent element.

    eps_mse   mean over C,H,W of (eps_policy - eps_reference)^2
    gaussian  mean over C,H,W of (mean_policy - mean_reference)^2 / (2 std^2), the exact KL of the two steps

    Args:
        policy, reference: (B, ...) predicted noise after guidance (eps_mse), or means of the transition
            (gaussian); no gradient reaches the reference.
        kind: Which of the two.
        std: gaussian only: number or (B,), > 0, of the transition; shared by both.
    Returns:
        (B,) non-negative; policy = reference gives 0. The kinds differ by a factor that depends on the step
        alone: (d mean / d eps)^2 / (2 std^2).
    Raises:
        ValueError: an unknown kind, std missing for gaussian or given for eps_mse.
    Source: DPOK (arXiv 2305.16381): the paper's KL is gaussian; the authors' code drops its weights, which is
        eps_mse.
    """
    check_known("dpok_kl", get_args(KlKind), kind=kind)
    if (std is None) == (kind == "gaussian"):
        advice = "pass the transition's std" if std is None else "leave std out, or take kind='gaussian'"
        raise ValueError(f"dpok_kl: kind is {kind!r} and std is {std}; {advice}")
    if std is None:
        return prediction_error(policy, reference.detach())
    return gaussian_kl(policy, reference.detach(), std)


class ValueNetwork(nn.Module):
    """V = centre + scale * MLP(inputs); the last layer starts at 0, so V starts at the centre.

    Source: DPOK (arXiv 2305.16381), authors' code, whose network has no centre and scale: where rewards are
    far from 0 it then takes thousands of updates until the baseline is of use.
    """

    def __init__(self, num_inputs: int, generator: torch.Generator, centre: float, scale: float) -> None:
        """`centre` and `scale` are mean and std of the first rewards."""
        super().__init__()
        # The precision of `value_inputs`, whatever torch's default is.
        self.first, self.second, self.last = (
            nn.Linear(*sizes, dtype=torch.float32, device="meta").to_empty(device="cpu")
            for sizes in ((num_inputs, VALUE_WIDTH), (VALUE_WIDTH, VALUE_WIDTH), (VALUE_WIDTH, 1))
        )
        for layer in (self.first, self.second, self.last):
            deviation = 0.0 if layer is self.last else layer.in_features**-0.5
            nn.init.normal_(layer.weight, std=deviation, generator=generator)
            nn.init.zeros_(layer.bias)
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B,) for inputs (B, num_inputs)."""
        hidden = nn.functional.silu(self.first(inputs))
        hidden = nn.functional.silu(self.second(hidden))
        return self.centre + self.scale * self.last(hidden)[:, 0]


class Dpok(TransitionMethod):
    """DPOK on a `TrajectoryBatch` whose advantages are rewards minus baseline; guidance acts as in the
    rollout."""

    settings: DpokConfig
    value_network = ValueNetwork
    value_loss = staticmethod(dpok_value_loss)

    def row_losses(self, policy: Policy, batch: TrajectoryBatch) -> RowLosses:
        """Weighted policy loss plus weighted KL of each transition."""
        settings = self.settings
        current = replay_batch(policy, batch, "current")
        per_row = settings.reward_weight * dpok_policy_loss(
            current.log_prob, batch.old_log_prob, batch.advantages, clip_range=settings.clip_range
        )
        ratio = probability_ratio(current.log_prob, batch.old_log_prob)
        values = ratio_values(ratio, clip_range=settings.clip_range)
        if settings.needs_reference:
            kl = self._kl(policy, batch, current, replay_batch(policy, batch, "reference"))
            per_row = per_row + settings.kl_weight * kl
            values["train/reference_kl"] = kl
        return per_row, values

    def value_inputs(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the baseline sees of a transition, (B, n): its latents, its time, the mean of the prompt's
        embeddings."""
        clock = torch.stack([t, torch.sin(math.pi * t), torch.cos(math.pi * t)], dim=-1)
        text = [
            tensor.reshape(len(tensor), -1, tensor.shape[-1]).mean(dim=1)
            for tensor in conditioning.tensors.values()
            if tensor.is_floating_point()
        ]
        return torch.cat([part.float() for part in (x_t.flatten(1), clock, *text)], dim=1)

    def _kl(self, policy: Policy, batch: TrajectoryBatch, current: Replayed, reference: Replayed) -> Tensor:
        if self.settings.kl == "gaussian":
            return dpok_kl(current.mean, reference.mean, kind="gaussian", std=current.std)
        step = transition_rows(sampler_transitions(policy.path, batch.sampler), batch.index)
        eps, eps_ref = (
            policy.path.x0_eps_at(replayed.prediction, batch.x_t, step.alpha_t, step.sigma_t)[1]
            for replayed in (current, reference)
        )
        return dpok_kl(eps, eps_ref)
