"""DiffusionNFT: online fine-tuning on the forward process, with an implicit negative policy. Source: arXiv
2509.16117; conventions of the authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero, check_known
from diffexpo.algorithms.forward import RowLosses, squared_distance
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.config.methods.diffusion_nft import DiffusionNftConfig
from diffexpo.diffusion.kernels import Coefficient, at_least_float32, x0_from_velocity
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import Policy, ScoredBatch

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
MODES: tuple[Mode, ...] = get_args(Mode)
SMALLEST_NORM = 1e-5


def nft_loss(
    velocity: Tensor,
    velocity_old: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Coefficient,
    optimality: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DiffusionNFT loss of each sample, r D(x0+, x0) / beta + (1 - r) D(x0-, x0) / beta.

    x0+- = x_t - t (v_old +- beta (v - v_old)),   D(a, x0) = mean (a - x0)^2 / stop(max(mean |a - x0|, 1e-5))

    Args:
        velocity: (B, ...) the policy's prediction of eps - x0.
        velocity_old: (B, ...) that of the policy which drew x0; no gradient reaches it.
        x0: (B, ...) samples.
        x_t: (B, ...) = (1 - t) x0 + t eps.
        t: number or (B,) in [0, 1].
        optimality: (B,) r in [0, 1], see `nft_optimality`; no gradient reaches it.
        beta: > 0; how far v+ and v- lie from v_old. 1 makes v+ the policy itself.
    Returns:
        (B,). Neither the authors' factor 5 (the clip of the advantages) nor the KL term is inside: their
        total is 5 mean(nft_loss) + 1e-4 mean((v - v_ref)^2). At velocity = velocity_old it is D(x0_old, x0) /
        beta whatever r is, with the gradient of (2 r - 1) D by the velocity; 0 for r = 1/2.
    Raises:
        ValueError: beta is not above 0.
    Source: DiffusionNFT (arXiv 2509.16117), authors' code. There the norm is float64; here it has the
        precision of the inputs, float32 or better.
    """
    check_above_zero("nft_loss", beta=beta)
    velocity, velocity_old = at_least_float32(velocity), at_least_float32(velocity_old).detach()
    step = beta * (velocity - velocity_old)
    positive = _normalised_error(x0_from_velocity(velocity_old + step, x_t, t), x0)
    negative = _normalised_error(x0_from_velocity(velocity_old - step, x_t, t), x0)
    r = at_least_float32(optimality).detach()
    return (r * positive + (1 - r) * negative) / beta


def nft_optimality(advantages: Tensor, *, clip: float = 5.0, mode: Mode = "all") -> Tensor:
    """Optimality r of each sample, 1/2 + clamp(A, -clip, clip) / (2 clip), in [0, 1].

    all            A                      one_only  1 where A > 0, else 0
    positive_only  max(A, 0)              binary    sign(A)
    negative_only  min(A, 0)

    Args:
        advantages: (B,) rewards less their group's mean, over a standard deviation.
        clip: > 0, the advantage at which r reaches 0 or 1.
        mode: What is done to the clipped advantages A before they are scaled.
    Returns:
        (B,) without gradient. Advantage 0 gives 1/2, clip gives 1. With clip 5 binary gives 0.4, 0.5 or 0.6,
        not 0 or 1, as in the authors' code.
    Raises:
        ValueError: clip or mode out of range.
    Source: DiffusionNFT (arXiv 2509.16117), authors' code (`adv_clip_max`, `adv_mode`).
    """
    check_above_zero("nft_optimality", clip=clip)
    check_known("nft_optimality", MODES, mode=mode)
    clipped = at_least_float32(advantages).detach().clamp(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clamp(min=0)
    elif mode == "negative_only":
        clipped = clipped.clamp(max=0)
    elif mode == "one_only":
        clipped = (clipped > 0).to(clipped)
    elif mode == "binary":
        clipped = clipped.sign()
    # one_only and binary do not scale with clip; with a clip below 1 they would leave [0, 1].
    return (0.5 + clipped / (2 * clip)).clamp(0, 1)


def old_policy_decay(step: int, *, kind: Literal[0, 1, 2]) -> float:
    """Share of the old policy that is kept, v_old <- decay v_old + (1 - decay) v, after an update.

    0  0                        1  min(0.001 step, 0.5)             2  min(max(0.0075 (step - 75), 0), 0.999)

    Args:
        step: Updates so far, >= 0.
        kind: Which schedule.
    Returns:
        In [0, 1]. 0 is on-policy. Kind 2 at step 175 gives 0.75.
    Raises:
        ValueError: step is negative or kind unknown.
    Source: DiffusionNFT (arXiv 2509.16117), authors' code (`decay_type`).
    """
    if step < 0:
        raise ValueError(f"old_policy_decay: step is {step}; expected 0 or more")
    if kind == 0:
        return 0.0
    if kind == 1:
        return min(0.001 * step, 0.5)
    if kind == 2:
        return min(max(0.0075 * (step - 75), 0.0), 0.999)
    raise ValueError(f"old_policy_decay: kind is {kind!r}; expected 0, 1 or 2")


def _normalised_error(estimate: Tensor, x0: Tensor) -> Tensor:
    difference = (estimate - at_least_float32(x0)).flatten(1)
    norm = difference.detach().abs().mean(dim=1).clamp(min=SMALLEST_NORM)
    return difference.square().mean(dim=1) / norm


class DiffusionNft(ScoredMethod):
    """DiffusionNFT on a `ScoredBatch` of images that the old policy drew; the clip of the advantages times
    the loss, plus KL."""

    settings: DiffusionNftConfig

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """clip * nft_loss + kl_weight * mean (v - v_ref)^2 of each image."""
        settings = self.settings
        current, old = (images.predict_under(policy, version) for version in ("current", "old"))
        r = nft_optimality(batch.advantages, clip=settings.advantage_clip, mode=settings.advantage_mode)
        velocity, t = _as_velocity(policy, images, current)
        velocity_old, _ = _as_velocity(policy, images, old)
        loss = nft_loss(velocity, velocity_old, images.x0, images.x_t, t, r, beta=settings.beta)
        loss = settings.advantage_clip * loss
        values = {
            "train/old_distance": squared_distance(current, old),
            "train/optimality": r,
            "train/optimality_saturated": ((r == 0) | (r == 1)).to(r),
        }
        if settings.needs_reference:
            distance = squared_distance(current, images.predict_under(policy, "reference"))
            values["train/reference_distance"] = distance
            loss = loss + settings.kl_weight * distance
        return loss, values

    def after_step(self, policy: Policy, step: int) -> None:
        """Let the old policy follow, unless it is held for the whole iteration."""
        if self.settings.old_decay == "iteration":
            return
        decay = old_policy_decay(step, kind=self.settings.old_decay)
        policy.weights.follow("old", "current", decay)


def _as_velocity(policy: Policy, images: NoisyImages, prediction: Tensor) -> tuple[Tensor, Coefficient]:
    """A velocity and a time with x0 = x_t - t velocity. What is linear in one prediction is so in any other,
    so the implicit policies of `nft_loss` are the same whatever the network predicts.
    """
    if policy.path.kind == "flow":
        return prediction, images.t.to(prediction.device)
    x0, _ = policy.path.x0_eps(prediction, images.x_t, images.t.detach().cpu().to(torch.float64))
    return images.x_t - x0, 1.0
