"""The options of the methods learn as well: samples move to where the winners, or the desirable images, are.

Every bound is many standard errors wide of chance; the numbers found are several times larger.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import rwr_weights
from diffexpo.algorithms.diffusion_kto import UTILITIES
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.diffusion_kto import DiffusionKtoConfig
from diffexpo.config.methods.rwr import RwrConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator
from diffexpo.types import ScoredBatch
from tests.learning.test_preferences import standard_errors
from tests.learning.toy import PROMPTS, SidePairs, draw, make_policy, train_offline

STEPS, RATE, SIZE = 60, 3e-3, 32
PAIR_LOSSES: dict[str, dict[str, object]] = {
    "hinge": {"kind": "hinge"},
    "ipo": {"kind": "ipo"},
    "cdpo": {"kind": "cdpo", "label_smoothing": 0.1},
    "robust": {"kind": "robust", "label_smoothing": 0.1},
    "linear": {"kind": "linear"},
    "simpo": {"kind": "simpo", "simpo_gamma": 0.5},
    "anchor": {"sft_weight": 1.0},
    "safeguard": {"safeguard": True, "safeguard_mu": 0.6},
    "several draws": {"draws": 4},
    "held to the base": {"anchor_weight": 0.02, "anchor_guidance": 2.0},
    "automatic beta": {"auto_beta": True, "beta": 5000.0},
}
IMAGE_LOSSES: dict[str, DiffusionKtoConfig | RwrConfig] = {
    **{utility: DiffusionKtoConfig(beta=10.0, utility=utility) for utility in UTILITIES},
    "mean of classes": DiffusionKtoConfig(beta=10.0, baseline="class_mean"),
    "sparse weights": RwrConfig(kind="sparse", percentile=75.0),
}


class SideImages:
    """N(0, 1) latents, desirable where they lie on the positive side of the first axis; any number of batches."""

    def __init__(self, policy: ToyPolicy, size: int) -> None:
        self.embeddings, self.size = PromptEmbeddings(policy), size

    def batch(self, step: int) -> ScoredBatch:
        latents = torch.randn(self.size, 2, 1, 1, generator=torch_generator("images", step))
        rewards = latents[:, 0, 0, 0]
        return ScoredBatch(
            latents,
            self.embeddings.select([PROMPTS[row % len(PROMPTS)].text for row in range(self.size)]),
            tuple(f"{step}-{row}" for row in range(self.size)),
            rewards,
            rewards,
            torch.zeros(self.size, dtype=torch.int64),
            rewards > 0,
            rwr_weights(rewards, kind="sparse", percentile=75.0),
        )


class Unweighted(SideImages):
    """The same images without weights."""

    def batch(self, step: int) -> ScoredBatch:
        from dataclasses import replace

        return replace(super().batch(step), weight=None)


@cache
def start() -> Tensor:
    return draw(make_policy("vp", "full"), "current")


def assert_moved_along_the_first_axis(policy: ToyPolicy) -> None:
    after = draw(policy, "current")
    assert torch.isfinite(after).all()
    assert standard_errors(after[:, 0], start()[:, 0]) > 10
    moved = (after.mean(dim=0) - start().mean(dim=0)).abs()
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_on_pairs_learns(name: str, tmp_path: Path) -> None:
    policy = make_policy("vp", "full")
    settings = DiffusionDpoConfig(**({"beta": 10.0} | PAIR_LOSSES[name]))
    train_offline(policy, settings, SidePairs(policy, SIZE), tmp_path, STEPS, RATE)
    assert_moved_along_the_first_axis(policy)


@pytest.mark.parametrize("name", IMAGE_LOSSES)
def test_every_loss_on_images_learns(name: str, tmp_path: Path) -> None:
    policy = make_policy("vp", "full")
    is_weighted = isinstance(IMAGE_LOSSES[name], RwrConfig)
    loader = (SideImages if is_weighted else Unweighted)(policy, SIZE)
    train_offline(policy, IMAGE_LOSSES[name], loader, tmp_path, STEPS, RATE)
    assert_moved_along_the_first_axis(policy)
