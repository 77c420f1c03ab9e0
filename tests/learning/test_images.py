"""The methods on images and self-play move a toy policy to where they should, in the outer loop itself.

Every bound is many standard errors wide of chance; the numbers found are several times larger.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.types import ScoredBatch
from tests.learning.test_preferences import standard_errors
from tests.learning.toy import SAMPLERS, draw, make_loop, make_policy, reward_of

OWN = {"offline": {"source": None}, "hybrid": {"decay": 0.0}, "explore": {"agents": 1}}
METHODS: dict[str, dict[str, object]] = {
    "sft": {"algorithm": {"type": "sft"}},
    "raft": {"algorithm": {"type": "sft"}, "offline": {"source": None}},
    "diffusion_kto": {"algorithm": {"type": "diffusion_kto", "beta": 5.0}},
    "rwr": {"algorithm": {"type": "rwr", "temperature": 0.02}, "offline": {"source": None}},
    "orpo": {"algorithm": {"type": "orpo", "weight": 1.0}},
    "mapo": {"algorithm": {"type": "mapo", "num_train_timesteps": 10}},
    "diffusion_nft": {"algorithm": {"type": "diffusion_nft", "advantage_clip": 1.5}, **OWN},
    "awm": {"algorithm": {"type": "awm", "clip_range": 0.2}, **OWN},
    "dgpo": {"algorithm": {"type": "dgpo", "beta": 10.0}},
    "spin": {
        "algorithm": {"type": "spin", "beta": 10.0},
        "hybrid": {"decay": 0.0, "offline_weight": 0.0},
        "explore": {"agents": 1},
    },
}


def config(kind: str, name: str, **training: object) -> RunConfig:
    groups = {key: dict(value) for key, value in METHODS[name].items()}
    explore = {
        "iterations": 3,
        "prompts_per_iteration": 48,
        "images_per_prompt": 2,
        "sampler": SAMPLERS[kind].model_dump(),
        "negatives": {"source": None},
    }
    values = {
        "steps": 40,
        "batch_size": 32,
        "micro_batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    }
    groups["explore"] = explore | groups.get("explore", {})
    groups["training"] = values | groups.get("training", {}) | training
    return RunConfig.model_validate(groups)


def run(kind: str, name: str, folder: Path, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Samples (4096, 2) of the base and of the last iterate."""
    policy = make_policy(kind, "full")
    before = draw(policy, "base")
    loop = make_loop(config(kind, name), policy, folder)
    if reverse:
        inner = loop.engine.algorithm.loss
        loop.engine.algorithm.loss = lambda policy, batch, key: inner(policy, mirrored(batch), key)
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    return before, draw(policy, "current")


def mirrored(batch: ScoredBatch) -> ScoredBatch:
    """The batch with every judgement turned round."""
    from dataclasses import replace

    return replace(batch, advantages=-batch.advantages, desirable=~batch.desirable)


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("name", METHODS)
def test_samples_move_to_where_the_reward_is(name: str, kind: str, tmp_path: Path) -> None:
    before, after = run(kind, name, tmp_path / "run")
    assert standard_errors(reward_of(after), reward_of(before)) > 10
    assert torch.isfinite(after).all()
    # The axis that decides nothing moves less than the one that decides.
    moved = (after.mean(dim=0) - before.mean(dim=0)).abs()
    assert moved[1] < moved[0]


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "dgpo"])
def test_turned_judgements_move_samples_the_other_way(name: str, tmp_path: Path) -> None:
    before, after = run("flow", name, tmp_path / "run", reverse=True)
    assert standard_errors(reward_of(before), reward_of(after)) > 10
