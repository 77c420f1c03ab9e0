"""Every method on images with a small policy, an old policy and a batch that it learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from diffexpo.algorithms import algorithm_class
from diffexpo.config.methods import METHOD_BY_NAME, MethodConfig
from diffexpo.diffusion import Path
from diffexpo.policies.toy import TOY_FULL, ToyPolicy
from diffexpo.types import Algorithm, PairBatch, ScoredBatch
from tests.commands import ROOT
from tests.unit.diffusion.toys import ABAR

KEY = (0, 1, "noise", 3)
PATHS = {"vp": Path.vp(ABAR), "flow": Path.flow(3.0)}
ROWS = 8
# Strong enough that every term of a loss counts beside the others; half of the rows have the empty prompt.
SETTINGS: dict[str, dict[str, object]] = {
    "diffusion_dpo": {"beta": 30.0},
    "spin": {"beta": 30.0},
    "mapo": {"num_train_timesteps": 30},
    "orpo": {"beta": 3.0, "weight": 2.0},
    "python": {"path": f"{ROOT}/tests/own_losses.py:dpo"},
    "sft": {},
    "guidance_distillation": {"guidance": 3.0},
    "rwr": {"temperature": 0.5},
    "diffusion_kto": {"beta": 30.0},
    "diffusion_nft": {"kl_weight": 0.5, "beta": 0.5},
    "awm": {"kl_weight": 0.5, "clip_range": 0.1, "weighting": "ghuber"},
    "dgpo": {"beta": 30.0, "clip_range": 0.1},
}
ON_PAIRS = ("diffusion_dpo", "spin", "mapo", "orpo", "python")
ON_IMAGES = tuple(name for name in SETTINGS if name not in ON_PAIRS)


def settings_of(name: str, **changes: object) -> MethodConfig:
    return METHOD_BY_NAME[name].model_validate(
        {"type": name, "empty_prompt_fraction": 0.5} | SETTINGS[name] | changes
    )


def make(name: str, policy: ToyPolicy, **changes: object) -> Algorithm:
    return algorithm_class(name)(settings_of(name, **changes), policy.encode_prompts([""]))


def make_policy(kind: str = "vp", *, moved: bool = True) -> ToyPolicy:
    """Current, old and reference apart from one another if `moved`, else equal."""
    policy = ToyPolicy(PATHS[kind], tuning=TOY_FULL)
    policy.weights.copy("current", "old")
    if moved:
        generator = torch.Generator().manual_seed(0)
        for version in ("old", "current"):
            state = policy.weights.state(version)
            policy.weights.load(
                version,
                {
                    name: value + 0.1 * torch.randn(value.shape, generator=generator)
                    for name, value in state.items()
                },
            )
    return policy


def make_batch(name: str, policy: ToyPolicy, seed: int = 0) -> PairBatch | ScoredBatch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, ROWS, *policy.latent_shape, generator=generator)
    keys = tuple(f"row {seed} {row}" for row in range(ROWS))
    if name in ON_PAIRS:
        prompts = [f"prompt {row}" for row in range(ROWS)]
        weight = torch.rand(ROWS, generator=generator)
        return PairBatch(latents[0], latents[1], policy.encode_prompts(prompts), keys, weight)
    groups = torch.arange(ROWS) // 4
    rewards = torch.rand(ROWS, generator=generator)
    means = torch.stack([rewards[:4].mean(), rewards[4:].mean()])[groups]
    advantages = (rewards - means) / rewards.std()
    weight = torch.rand(ROWS, generator=generator) if name in ("rwr", "sft") else None
    return ScoredBatch(
        latents[0],
        policy.encode_prompts([f"prompt {group}" for group in groups]),
        keys,
        rewards,
        advantages,
        groups,
        rewards > 0.5,
        weight,
        is_grouped=name == "dgpo",
    )


def gradients(policy: ToyPolicy, loss: Tensor) -> dict[str, Tensor]:
    trainable = policy.weights.trainable()
    return dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))
