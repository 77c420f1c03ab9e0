"""What all methods of the forward process share: clean images are noised to one random time, and the
prediction there is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.diffusion.kernels import add_noise, at_least_float32, prediction_error
from diffexpo.diffusion.objectives import NoiseDraw, empty_prompt_mask
from diffexpo.errors import ConfigError
from diffexpo.types import Conditioning, Policy

Metrics = dict[str, tuple[Tensor, int]]
NoiseKey = tuple[str | int, ...]


class KeyedNoise:
    """Noise, times and empty prompts of rows, drawn by the rows' names, so that no split of a batch changes
    them."""

    def __init__(self, settings: ForwardConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        if settings.empty_prompt_fraction > 0 and empty is None:
            raise ConfigError(
                f"algorithm.empty_prompt_fraction is {settings.empty_prompt_fraction}, but no conditioning "
                "of the empty prompt was given; pass `empty`, or set the fraction to 0"
            )
        self.settings = settings
        self.empty = empty

    def draw(
        self, policy: Policy, names: Sequence[str], noise_key: NoiseKey, shape: Sequence[int]
    ) -> NoiseDraw:
        """Noise and time of rows; rows of one name share them."""
        return NoiseDraw.keyed(names, noise_key, policy.path, shape, self.settings.timestep_range)

    def with_empty_prompts(
        self, conditioning: Conditioning, names: Sequence[str], noise_key: NoiseKey
    ) -> Conditioning:
        """The conditioning with a keyed share of its rows replaced by the empty prompt."""
        fraction = self.settings.empty_prompt_fraction
        if fraction == 0 or self.empty is None:
            return conditioning
        mask = empty_prompt_mask(names, noise_key, fraction)
        return with_rows_replaced(conditioning, self.empty, mask) if bool(mask.any()) else conditioning


def with_rows_replaced(conditioning: Conditioning, empty: Conditioning, mask: Tensor) -> Conditioning:
    """The conditioning with the one row of `empty` wherever `mask` (B,) holds."""
    tensors = {}
    for name, rows in conditioning.tensors.items():
        chosen = mask.to(rows.device).reshape(-1, *[1] * (rows.ndim - 1))
        tensors[name] = torch.where(chosen, empty.tensors[name].to(rows.device, rows.dtype), rows)
    return Conditioning(tensors)


@dataclass(frozen=True)
class NoisyImages:
    """Images at a noise and time each: what the network is given, what it should say, and its answer under
    any version."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    target: Tensor
    conditioning: Conditioning

    def predict(self, policy: Policy, version: str) -> Tensor:
        """Prediction (B,C,h,w) of a version of the weights; with gradient under "current" alone."""
        with (
            policy.weights.use(version),
            torch.set_grad_enabled(torch.is_grad_enabled() and version == "current"),
        ):
            return at_least_float32(policy.predict(self.x_t, self.t.to(self.x_t.device), self.conditioning))

    def error(self, prediction: Tensor) -> Tensor:
        """Mean squared error (B,) of a prediction."""
        return prediction_error(prediction, self.target)


def noisy_images(policy: Policy, x0: Tensor, draw: NoiseDraw, conditioning: Conditioning) -> NoisyImages:
    """x_t = alpha_t x0 + sigma_t eps and the policy's own target there, as in `prediction_errors`."""
    x0 = at_least_float32(x0)
    eps = draw.eps.to(x0.device, x0.dtype)
    # Scales in float64 from the table, so that they are the same whatever device the latents are on.
    precise_t = draw.t.detach().cpu().to(torch.float64)
    x_t = add_noise(x0, eps, *policy.path.alpha_sigma(precise_t))
    return NoisyImages(x0, x_t, draw.t, policy.path.target(x0, eps, precise_t), conditioning)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference (B,) of two predictions; no gradient reaches the second."""
    return (first - second.detach()).square().flatten(1).mean(dim=1)


def as_metrics(values: Mapping[str, Tensor]) -> Metrics:
    """Sums with counts of metrics given row by row; metrics without a row are left out."""
    return {name: (value.detach().sum(), len(value)) for name, value in values.items() if len(value)}


def share_above_zero(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 1/2 where it is 0, else 0."""
    margin = margin.detach()
    return (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
