"""Training methods, one a file: a pure function on (B,) tensors and a small class that feeds it."""

from diffexpo.algorithms.diffusion_dpo import (
    DiffusionDpo,
    diffusion_dpo_loss,
    pair_margin,
    simpo_loss,
)
from diffexpo.algorithms.expo import Expo, exploration_bonus, expo_loss

ALGORITHMS: dict[str, type[DiffusionDpo]] = {"expo": Expo, "diffusion_dpo": DiffusionDpo}

__all__ = [
    "ALGORITHMS",
    "DiffusionDpo",
    "Expo",
    "diffusion_dpo_loss",
    "exploration_bonus",
    "expo_loss",
    "pair_margin",
    "simpo_loss",
]
