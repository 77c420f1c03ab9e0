"""Reward-weighted regression: supervised fine-tuning on own samples, weighted by a function of their rewards.

loss = mean(w error),   w = B softmax(rewards / temperature)   or   w = B / K on the K best, 0 elsewhere
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_known
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.algorithms.sft import sft_loss
from diffexpo.config.methods.rwr import RwrConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.errors import DataError
from diffexpo.types import Policy, ScoredBatch

Kind = Literal["exponential", "sparse"]


def rwr_weights(
    rewards: Tensor,
    *,
    kind: Kind = "exponential",
    temperature: float | None = None,
    percentile: float | None = None,
) -> Tensor:
    """Weights of the samples' errors in `sft_loss`, from their rewards.

    exponential  w_b = B exp(r_b / temperature) / sum_j exp(r_j / temperature)
    sparse       w_b = B / K where r_b >= the percentile of the rewards, else 0;   K samples are kept

    Args:
        rewards: (B,) floating, finite; the whole data set, or one prompt's group (call it per group, then).
        kind: How rewards become weights.
        temperature: > 0, in units of the rewards, for exponential only. It divides; large is flat, small
            keeps the best alone.
        percentile: In [0, 100], for sparse only; 90 keeps the best tenth, 100 the maxima, 0 everything.
    Returns:
        (B,), not negative, summing to B, without gradient. Equal rewards give 1 each.
    Raises:
        ValueError: rewards empty, not (B,), not floating or not finite; kind unknown; temperature or
            percentile missing, out of range, or given to the other kind.
    Source: DDPO (arXiv 2305.13301), its baselines RWR and RWR-sparse, as in the authors' code. Their
        "temperature" multiplies the reward (0.2 there is 5 here); their sparse weights are 1, ours B / K, so
        that the mean over the batch is the mean over the samples kept.
    """
    if rewards.ndim != 1 or len(rewards) == 0 or not rewards.is_floating_point():
        raise ValueError(
            f"rwr_weights: rewards are {rewards.dtype} of shape {tuple(rewards.shape)}; expected floating "
            "numbers of shape (B,), B >= 1"
        )
    if not bool(torch.isfinite(rewards).all()):
        count = int((~torch.isfinite(rewards)).sum())
        raise ValueError(f"rwr_weights: {count} of {len(rewards)} rewards are not finite; leave them out")
    check_known("rwr_weights", get_args(Kind), kind=kind)
    rewards = at_least_float32(rewards.detach())
    if kind == "exponential":
        if temperature is None or not temperature > 0 or percentile is not None:
            raise ValueError(
                f"rwr_weights: temperature is {temperature} and percentile {percentile}; exponential expects "
                "a temperature above 0 and no percentile"
            )
        return len(rewards) * torch.softmax(rewards / temperature, dim=0)
    if percentile is None or not 0 <= percentile <= 100 or temperature is not None:
        raise ValueError(
            f"rwr_weights: percentile is {percentile} and temperature {temperature}; sparse expects a "
            "percentile in [0, 100] and no temperature"
        )
    # The rank above which samples lie; interpolating between two rewards would keep the very same samples.
    rank = math.ceil(percentile * (len(rewards) - 1) / 100)
    kept = (rewards >= rewards.sort().values[rank]).to(rewards)
    return kept * (len(rewards) / kept.sum())


class Rwr(ScoredMethod):
    """Reward-weighted regression: supervised fine-tuning whose rows carry `rwr_weights` of their prompt's
    images."""

    settings: RwrConfig

    def weigh(self, rewards: Tensor) -> Tensor:
        """`rwr_weights` of the images of one prompt."""
        settings = self.settings
        if settings.kind == "exponential":
            return rwr_weights(rewards, kind="exponential", temperature=settings.temperature)
        return rwr_weights(rewards, kind="sparse", percentile=settings.percentile)

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """The error of each image; the weight is the batch's."""
        if batch.weight is None:
            raise DataError(
                "reward-weighted regression: the batch has no weights; expected `rwr_weights` of each "
                "prompt's images, which the loader computes once an iteration"
            )
        error = images.error_under(policy, "current")
        return sft_loss(error), {"train/error": error, "train/squared_weight": batch.weight.square()}
