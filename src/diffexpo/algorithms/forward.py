"""What methods share, above all those of the forward process: clean images are noised to one random time, and
the prediction there is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.diffusion.objectives import NoiseDraw, empty_prompt_mask
from diffexpo.errors import ConfigError
from diffexpo.types import Conditioning, LossOutput, Policy

Metrics = dict[str, tuple[Tensor, int | Tensor]]
NoiseKey = tuple[str | int, ...]
Rows = Tensor | tuple[Tensor, Tensor]
"""A metric row by row: (B,), or with the (B,) bool that says which rows have it."""
RowLosses = tuple[Tensor, Mapping[str, Rows]]
"""Loss (B,) of each row before its weight, and metrics row by row."""


class ForwardMethod:
    """A method of the forward process: its settings, and the noise, times and prompts of its rows."""

    settings: ForwardConfig

    def __init__(self, settings: ForwardConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        if settings.empty_prompt_fraction > 0 and empty is None:
            raise ConfigError(
                f"algorithm.empty_prompt_fraction is {settings.empty_prompt_fraction}, but no conditioning "
                "of the empty prompt was given; pass `empty`, or set the fraction to 0"
            )
        self.settings = settings
        self.empty = empty

    def draw_noise(
        self, policy: Policy, names: Sequence[str], noise_key: NoiseKey, latents: Tensor, draws: int = 1
    ) -> NoiseDraw:
        """Noise and times of rows by their names, so that no split of a batch changes them."""
        shape, times = latents.shape[1:], self.settings.timestep_range
        return NoiseDraw.keyed(names, noise_key, policy.path, shape, times, draws)

    def with_empty_prompts(
        self, conditioning: Conditioning, names: Sequence[str], noise_key: NoiseKey
    ) -> Conditioning:
        """The conditioning with a keyed share of its rows replaced by the empty prompt."""
        fraction = self.settings.empty_prompt_fraction
        if fraction == 0 or self.empty is None:
            return conditioning
        return with_rows_replaced(conditioning, self.empty, empty_prompt_mask(names, noise_key, fraction))


def with_rows_replaced(conditioning: Conditioning, empty: Conditioning, mask: Tensor) -> Conditioning:
    """The conditioning with the one row of `empty` wherever `mask` (B,) holds."""
    tensors = {}
    for name, rows in conditioning.tensors.items():
        chosen = mask.to(rows.device).reshape(-1, *[1] * (rows.ndim - 1))
        tensors[name] = torch.where(chosen, empty.tensors[name].to(rows.device, rows.dtype), rows)
    return Conditioning(tensors)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference (B,) of two predictions; no gradient reaches the second."""
    return (first - second.detach()).square().flatten(1).mean(dim=1)


def weighted(per_row: Tensor, weight: Tensor | None) -> Tensor:
    """Losses (B,) times the weights (B,) of their rows; None is 1."""
    return per_row if weight is None else per_row * weight.to(per_row)


def mean_output(per_row: Tensor, metrics: Metrics) -> LossOutput:
    """Mean of losses (B,), which joins the metrics."""
    loss = per_row.mean()
    return LossOutput(loss, metrics | {"train/loss": (loss.detach() * len(per_row), len(per_row))})


def as_metrics(values: Mapping[str, Rows]) -> Metrics:
    """Sums with counts of metrics given row by row; metrics without a row are left out.

    Rows that are chosen by a mask are counted on their device, so that nothing waits for it; a step none of
    whose rows is chosen has no such metric.
    """
    found: Metrics = {}
    for name, rows in values.items():
        if isinstance(rows, tuple):
            value, chosen = rows[0].detach(), rows[1]
            found[name] = (torch.where(chosen, value, 0.0).sum(), chosen.sum().to(value))
        elif len(rows):
            found[name] = (rows.detach().sum(), len(rows))
    return found


def share_above_zero(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 1/2 where it is 0, else 0."""
    margin = margin.detach()
    return (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
