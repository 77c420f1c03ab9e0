"""What all methods on single images with a score share: noise and prompts by name, weights, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from diffexpo.algorithms.forward import KeyedNoise, NoiseKey, NoisyImages, as_metrics, noisy_images
from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.types import Conditioning, LossOutput, Policy, ScoredBatch


class ScoredMethod(ABC):
    """A method whose loss is a mean over images; a subclass gives each image's (`row_losses`)."""

    settings: ForwardConfig

    def __init__(self, settings: ForwardConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        self.settings = settings
        self.noise = KeyedNoise(settings, empty)

    @abstractmethod
    def row_losses(
        self, policy: Policy, batch: ScoredBatch, images: NoisyImages
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss (B,) of each image before its weight, and metrics row by row."""

    def loss(self, policy: Policy, batch: ScoredBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean over images of weight times loss, and its metrics; noise is keyed by (noise_key, name of the
        row)."""
        per_row, values = self.row_losses(policy, batch, self.noised(policy, batch, noise_key))
        if batch.weight is not None:
            per_row = per_row * batch.weight.to(per_row)
        return LossOutput(per_row.mean(), as_metrics({"train/loss": per_row, **values}))

    def noise_names(self, batch: ScoredBatch) -> Sequence[str]:
        """Names of the rows' noise: each image has its own."""
        return batch.keys

    def noised(self, policy: Policy, batch: ScoredBatch, noise_key: NoiseKey) -> NoisyImages:
        """The batch's images at their noise, times and prompts."""
        names = self.noise_names(batch)
        draw = self.noise.draw(policy, names, noise_key, batch.latents.shape[1:])
        conditioning = self.noise.with_empty_prompts(batch.conditioning, names, noise_key)
        return noisy_images(policy, batch.latents, draw, conditioning)
