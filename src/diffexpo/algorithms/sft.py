"""Supervised fine-tuning on chosen samples: the denoising error itself, optionally weighted.

Best-of-n fine-tuning (RAFT) is this loss on `best_and_worst(scores)[0]` of each group; reward-weighted
regression is this loss with `rwr_weights`.
"""

from __future__ import annotations

from torch import Tensor

from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import Policy, ScoredBatch


def sft_loss(error: Tensor, weight: Tensor | float | None = None) -> Tensor:
    """Denoising error of each sample times its weight, weight * error.

    Args:
        error: (B,) mean squared prediction errors of the policy.
        weight: number or (B,), >= 0; None is 1. No gradient reaches it. Weights that sum to B make the mean
            over the batch a weighted mean, so that leaving samples out does not shrink the step.
    Returns:
        (B,). Without a weight it is `error`, bit for bit.
    Source: DDPM (arXiv 2006.11239) eq. 14 and rectified flow (arXiv 2209.03003) eq. 1, with the mean over
        elements; RAFT (arXiv 2304.06767) trains on the best of n.
    """
    error = at_least_float32(error)
    if weight is None:
        return error
    return (weight.detach() if isinstance(weight, Tensor) else weight) * error


class Sft(ScoredMethod):
    """Supervised fine-tuning on a `ScoredBatch` of images that were kept: winners of D_off, the best of each
    prompt (RAFT)."""

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """The error of each image."""
        error = images.error_under(policy, "current")
        return sft_loss(error), {"train/error": error}
