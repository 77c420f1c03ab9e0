"""What all methods on single images with a score share: noise and prompts by name, weights, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from diffexpo.algorithms.forward import ForwardMethod, NoiseKey, RowLosses, as_metrics, weighted
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import LossOutput, Policy, ScoredBatch


class ScoredMethod(ForwardMethod, ABC):
    """A method whose loss is a mean over images; a subclass gives each image's (`row_losses`)."""

    @abstractmethod
    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """Loss (B,) of each image before its weight, and metrics row by row."""

    def loss(self, policy: Policy, batch: ScoredBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean over images of weight times loss, and its metrics; noise is keyed by (noise_key, name of the
        row)."""
        per_row, values = self.row_losses(policy, batch, self.noised(policy, batch, noise_key))
        per_row = weighted(per_row, batch.weight)
        return LossOutput(per_row.mean(), as_metrics({"train/loss": per_row, **values}))

    def noise_names(self, batch: ScoredBatch) -> Sequence[str]:
        """Names of the rows' noise: each image has its own."""
        return batch.keys

    def noised(self, policy: Policy, batch: ScoredBatch, noise_key: NoiseKey) -> NoisyImages:
        """The batch's images at their noise, times and prompts."""
        names = self.noise_names(batch)
        draw = self.draw_noise(policy, names, noise_key, batch.latents)
        conditioning = self.with_empty_prompts(batch.conditioning, names, noise_key)
        return NoisyImages.at(policy, batch.latents, draw.eps, draw.t, conditioning)
