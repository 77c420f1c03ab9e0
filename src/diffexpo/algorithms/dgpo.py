"""DGPO: a preference between the better and the worse part of a group of samples of one prompt. Source: arXiv
2510.08425; conventions of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses, Rows, share_above_zero
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.config.methods.dgpo import DgpoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.errors import DataError
from diffexpo.types import Policy, ScoredBatch


def dgpo_loss(
    error: Tensor,
    error_ref: Tensor,
    advantage: Tensor,
    groups: Tensor,
    *,
    beta: float,
    error_old: Tensor | None = None,
    clip_range: float | None = None,
) -> Tensor:
    """Group preference loss, given to each sample of the group.

    -logsigmoid(-S_g),   S_g = beta / K_g sum over i in g of A_i (error_i - error_ref_i)

    Args:
        error: (B,) mean squared prediction errors of the policy; the samples of a group share noise and time.
        error_ref: (B,) those of the reference; no gradient reaches them.
        advantage: (B,) A, of sum 0 within a group; positive is better. No gradient reaches it.
        groups: (B,) integers, equal for the samples of one prompt. A group must be whole: K_g is counted.
        beta: > 0. The mean over K brings the 1/2: two samples with A = +-1 are Diffusion-DPO at this beta.
        error_old, clip_range: (B,) errors of an older policy, and 0 < clip_range < 1; both or neither. Where
            exp(error_old - error) is beyond 1 + clip_range (A > 0) or below 1 - clip_range (A < 0), the
            sample counts in S but gets no gradient.
    Returns:
        (B,), the same number within a group. Policy = reference gives ln 2 = 0.6931472. Its mean over the
        batch has the gradient beta / B sum_b sigmoid(S_g(b)) A_b d error_b.
    Raises:
        ValueError: shapes differ, beta or clip_range out of range, or only one of error_old and clip_range.
    Source: DGPO (arXiv 2510.08425), authors' code, without the KL term. Their code has a surrogate with the
        gradient of this loss divided by beta; a KL weight taken from there must be multiplied by beta.
    """
    if not error.shape == error_ref.shape == advantage.shape == groups.shape or error.ndim != 1:
        raise ValueError(
            f"dgpo_loss: error, error_ref, advantage and groups have shapes {tuple(error.shape)}, "
            f"{tuple(error_ref.shape)}, {tuple(advantage.shape)} and {tuple(groups.shape)}; expected (B,) "
            "each"
        )
    check_above_zero("dgpo_loss", beta=beta)
    if (error_old is None) != (clip_range is None):
        raise ValueError("dgpo_loss: one of error_old and clip_range is None; pass both, or neither")
    if clip_range is not None and not 0 < clip_range < 1:
        raise ValueError(f"dgpo_loss: clip_range is {clip_range}; expected 0 < clip_range < 1")
    error, advantage = at_least_float32(error), at_least_float32(advantage).detach()
    if error_old is not None and clip_range is not None:
        is_beyond = _is_beyond_clip(error, at_least_float32(error_old), advantage, clip_range)
        error = torch.where(is_beyond, error.detach(), error)
    return -logsigmoid(dgpo_margin(error, error_ref, advantage, groups, beta=beta))


def dgpo_margin(
    error: Tensor, error_ref: Tensor, advantage: Tensor, groups: Tensor, *, beta: float
) -> Tensor:
    """Margin of the better over the worse part of each sample's group, -S_g = -beta / K_g sum of A_i (error_i
    - error_ref_i).

    Args:
        error, error_ref, advantage, groups: (B,), see `dgpo_loss`.
        beta: > 0.
    Returns:
        (B,), the same number within a group. Policy = reference gives 0.
    Source: DGPO (arXiv 2510.08425).
    """
    contribution = advantage.detach() * (at_least_float32(error) - at_least_float32(error_ref).detach())
    # (B, B): which samples stand in one group. A scatter would add in another order on every run.
    together = (groups[:, None] == groups[None, :]).to(contribution)
    return -beta * (together @ contribution) / together.sum(dim=1)


def _is_beyond_clip(error: Tensor, error_old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    log_ratio = (error_old - error).detach()
    return torch.where(advantage > 0, log_ratio > math.log1p(clip_range), log_ratio < math.log1p(-clip_range))


class Dgpo(ScoredMethod):
    """DGPO on a `ScoredBatch` of whole groups, whose images share noise, time and the choice of the empty
    prompt."""

    settings: DgpoConfig

    def noise_names(self, batch: ScoredBatch) -> Sequence[str]:
        """Images of a group have one name."""
        return [f"group {group}" for group in batch.groups.tolist()]

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """The group's loss, for each of its images."""
        if not batch.is_grouped:
            raise DataError(
                "DGPO: the batch may hold parts of groups (is_grouped is False); its loss sums over a whole "
                "group, so expected batches that are cut between groups only"
            )
        beta, clip, clip_range = self.settings.beta, self.settings.advantage_clip, self.settings.clip_range
        error, error_ref = (images.error_under(policy, version) for version in ("current", "reference"))
        advantage = batch.advantages.clamp(-clip, clip)
        row = (error, error_ref, advantage, batch.groups)
        margin = dgpo_margin(*row, beta=beta).detach()
        values: dict[str, Rows] = {
            "train/margin": margin,
            "train/implicit_accuracy": share_above_zero(margin),
            "train/better_error": (error, advantage > 0),
            "train/worse_error": (error, advantage < 0),
        }
        error_old = None
        if clip_range is not None:
            error_old = images.error_under(policy, "old")
            is_beyond = _is_beyond_clip(error, error_old, advantage, clip_range)
            values["train/clip_fraction"] = is_beyond.to(error)
        return dgpo_loss(*row, beta=beta, error_old=error_old, clip_range=clip_range), values
