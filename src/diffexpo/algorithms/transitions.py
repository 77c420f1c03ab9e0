"""What the methods on trajectories share: transitions and their log-probs under versions of the weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffexpo.algorithms.forward import NoiseKey, RowLosses, as_metrics, mean_output, weighted
from diffexpo.config.methods.bases import TrajectoryConfig
from diffexpo.diffusion.objectives import under
from diffexpo.diffusion.sampling import Replayed, replay_transitions
from diffexpo.errors import DataError
from diffexpo.types import Conditioning, LossOutput, Policy, TrajectoryBatch, TrajectoryPairBatch


class TransitionMethod(ABC):
    """A method whose loss is a mean over transitions; a subclass gives each one's (`row_losses`)."""

    settings: TrajectoryConfig

    def __init__(self, settings: TrajectoryConfig, empty: Conditioning | None = None) -> None:
        """`empty` is not used: no row is trained with the empty prompt instead of its own."""
        self.settings = settings

    @abstractmethod
    def row_losses(self, policy: Policy, batch: Any) -> RowLosses:
        """Loss (B,) of each row of a batch of the card's kind before its weight, and metrics row by row."""

    def weights(self, batch: Any) -> Tensor | None:
        """Weights (B,) of the losses; None is 1."""
        return batch.weight

    def loss(self, policy: Policy, batch: Any, noise_key: NoiseKey) -> LossOutput:
        """Mean over the rows of weight times loss, and its metrics; nothing random is drawn."""
        per_row, values = self.row_losses(policy, batch)
        return mean_output(weighted(per_row, self.weights(batch)), as_metrics(values))


def replay_batch(
    policy: Policy, batch: TrajectoryBatch, version: str, *, is_negative_fixed: bool = False
) -> Replayed:
    """A batch's transitions under a version of the weights, with the guidance they were drawn with; with
    gradient under "current" alone."""
    with under(policy, version):
        return replay_transitions(
            policy,
            batch.sampler,
            batch.index,
            batch.x_t,
            batch.x_next,
            batch.conditioning,
            batch.negative_conditioning,
            is_negative_fixed=is_negative_fixed,
        )


def ratio_values(ratio: Tensor, *, clip_range: float) -> dict[str, Tensor]:
    """`train/ratio` and `train/clip_fraction`, (B,) each."""
    return {"train/ratio": ratio, "train/clip_fraction": ((ratio - 1).abs() > clip_range).to(ratio)}


def pair_log_probs(policy: Policy, batch: TrajectoryPairBatch, version: str) -> tuple[Tensor, Tensor]:
    """Mean log-probs (B,) of winners and losers under a version, in one forward on [winner; loser]; with
    gradient under "current" alone."""
    count, negative = len(batch), batch.negative_conditioning
    with under(policy, version):
        log_prob = replay_transitions(
            policy,
            batch.sampler,
            torch.cat([batch.index, batch.index]),
            torch.cat([batch.winner_x_t, batch.loser_x_t]),
            torch.cat([batch.winner_x_next, batch.loser_x_next]),
            Conditioning.concatenate([batch.conditioning, batch.conditioning]),
            None if negative is None else Conditioning.concatenate([negative, negative]),
        ).log_prob
    return log_prob[:count], log_prob[count:]


def preference_log_probs(policy: Policy, batch: TrajectoryPairBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean log-probs (B,) of winners and losers, under the policy and, without gradient, the reference."""
    return *pair_log_probs(policy, batch, "current"), *pair_log_probs(policy, batch, "reference")


def is_clipped(log_ratio: Tensor, clip_range: float) -> Tensor:
    """1 where the ratio is outside 1 plus or minus the range."""
    outside = (log_ratio > math.log1p(clip_range)) | (log_ratio < math.log1p(-clip_range))
    return outside.to(log_ratio)


def steps_of_pairs(batch: TrajectoryPairBatch) -> int:
    """Rows of each pair of trajectories.

    Raises:
        DataError: the batch is not grouped, or pairs differ in their number of rows.
    """
    if batch.groups is None:
        raise DataError("prdp: the batch has no groups; expected all steps of each pair behind each other")
    counts = torch.unique_consecutive(batch.groups, return_counts=True)[1]
    if bool((counts != counts[0]).any()):
        raise DataError(
            f"prdp: pairs of {int(counts.min())} to {int(counts.max())} steps in a batch; expected as many "
            "in each"
        )
    return int(counts[0])


def by_step(rows: Tensor, steps: int) -> Tensor:
    """Rows (P T,) of P pairs as (T, P)."""
    return rows.reshape(-1, steps).T
