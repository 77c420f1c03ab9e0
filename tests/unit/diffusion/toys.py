"""Denoisers whose answer is known: one that is exact for Gaussian data, and one of additions and products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, Path, replay_transitions
from diffexpo.diffusion.sampling import Trajectory
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning, Policy

SHAPE = (3, 4, 4)
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


class NoWeights:
    """One version of nothing; remembers which were asked for."""

    def __init__(self) -> None:
        self.used: list[str] = []

    @contextmanager
    def use(self, name: str, *, merged: bool = False) -> Iterator[None]:
        self.used.append(name)
        yield


class Toy:
    """What every denoiser here shares."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = torch.device("cpu")
        self.latent_shape = SHAPE
        self.fingerprint = "toy"
        self.weights = NoWeights()
        self.rows: list[int] = []


class Gaussian(Toy):
    """Exact prediction where data are N(mean, 0.5^2) in every element, the row's mean being its conditioning.

    E[eps | x_t] = sigma (x_t - alpha mean) / (alpha^2 0.25 + sigma^2), turned into the path's own prediction.
    """

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows.append(len(x_t))
        alpha, sigma = (c.to(x_t.dtype).reshape(-1, 1, 1, 1) for c in self.path.alpha_sigma(t.double()))
        mean = conditioning.tensors["mean"].to(x_t.dtype).reshape(-1, 1, 1, 1)
        gap = (x_t - alpha * mean) / (alpha**2 * 0.25 + sigma**2)
        eps, x0 = sigma * gap, mean + 0.25 * alpha * gap
        kind = self.path.prediction_type
        return {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "sample": x0,
            "flow": eps - x0,
        }[kind]


class Elementwise(Toy):
    """Additions and products only, so that its rounding cannot depend on the batch."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        mean = conditioning.tensors["mean"].to(x_t.dtype).reshape(-1, 1, 1, 1)
        return 0.75 * x_t - 0.5 * mean + (0.25 * t.to(x_t.dtype)).reshape(-1, 1, 1, 1)


def condition(*means: float) -> Conditioning:
    return Conditioning({"mean": torch.tensor(means)})


def noise(*keys: str) -> NoiseSource:
    return NoiseSource([torch_generator("toy", key) for key in keys], SHAPE)


def replayed_log_probs(
    policy: Policy,
    trajectory: Trajectory,
    conditioning: Conditioning,
    negative: Conditioning | None,
    sampler: SamplerConfig,
) -> Tensor:
    """Mean log-probs (T,B) of a trajectory under the weights in use; 0 where a step has no density."""
    rows = []
    for place, has_density in enumerate(trajectory.has_density.tolist()):
        index = torch.full((len(conditioning),), place)
        ends = trajectory.latents[place], trajectory.latents[place + 1]
        rows.append(
            replay_transitions(policy, sampler, index, *ends, conditioning, negative).log_prob
            if has_density
            else torch.zeros_like(trajectory.mean_log_probs[place])
        )
    return torch.stack(rows)
