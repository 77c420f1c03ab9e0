"""A method on scored images runs in the very loop of those on pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffexpo.config.methods import MethodConfig
from diffexpo.config.methods.data import Images
from diffexpo.data.store import Store
from diffexpo.diffusion.objectives import NoiseDraw, prediction_errors
from diffexpo.online.loaders import batches_of
from diffexpo.online.loop import Loop
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.training.engine import Engine
from diffexpo.types import LossOutput, Policy, ScoredBatch
from tests.learning.toy import draw, make_loop, make_policy, online_config, reward_of

QUICK = {"steps": 40, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3}


class AdvantageWeightedConfig(MethodConfig):
    """The card of a method that is in no table."""

    type: str = "advantage_weighted"
    whole_groups: bool = False

    title = "Advantage-weighted"

    @property
    def data(self) -> Images:
        return Images(whole_groups=self.whole_groups)


class AdvantageWeighted:
    """Mean of advantage times error, within its batch's groups or not: the simplest loss on scores."""

    def __init__(self, *, whole_groups: bool = False) -> None:
        self.settings = AdvantageWeightedConfig(whole_groups=whole_groups)
        self.seen: list[ScoredBatch] = []

    def loss(self, policy: Policy, batch: ScoredBatch, noise_key: tuple[str | int, ...]) -> LossOutput:
        self.seen.append(batch)
        noise = NoiseDraw.keyed(batch.keys, noise_key, policy.path, batch.latents.shape[1:])
        with policy.weights.use("current"):
            errors = prediction_errors(policy, batch.latents, noise.eps, noise.t, batch.conditioning)
        loss = (batch.advantages.clamp(min=0.0) * errors).mean()
        return LossOutput(loss, {"train/loss": (loss.detach() * len(batch), len(batch))})


def run(folder: Path, algorithm: AdvantageWeighted, **training: object) -> Loop:
    config = online_config(
        "vp", explore={"iterations": 2, "prompts_per_iteration": 24}, training=QUICK | training
    )
    policy = make_policy("vp", "full")
    loop = make_loop(config, policy, folder, offline_pairs=64)
    config = config.model_copy(update={"algorithm": algorithm.settings})
    engine = Engine(policy, algorithm, config.training, loop.metrics)
    loop = replace(loop, config=config, engine=engine)
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    return loop


@pytest.mark.parametrize("whole_groups", [False, True])
def test_a_method_on_scores_learns(tmp_path: Path, whole_groups: bool) -> None:
    algorithm = AdvantageWeighted(whole_groups=whole_groups)
    policy = run(tmp_path, algorithm).policy
    before, after = (float(reward_of(draw(policy, name)).mean()) for name in ("base", "current"))
    assert after > before + 0.02
    online = [batch for batch in algorithm.seen if any(key.startswith("0001-") for key in batch.keys)]
    assert online and all(batch.is_grouped is whole_groups for batch in algorithm.seen)
    assert Store(tmp_path / "store").completed()[-1] == ("train", 2)


def test_the_split_into_micro_batches_changes_rounding_only(tmp_path: Path) -> None:
    states = []
    for size in (16, 4):
        loop = run(tmp_path / str(size), AdvantageWeighted(), micro_batch_size=size, steps=5)
        states.append(loop.policy.weights.state("current"))
    moved = max(
        float((value - start).abs().max())
        for value, start in zip(
            states[0].values(), make_policy("vp", "full").weights.state("base").values(), strict=True
        )
    )
    gap = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    assert gap < 0.02 * moved


def test_pairs_and_scores_come_from_one_store(tmp_path: Path) -> None:
    loop = run(tmp_path, AdvantageWeighted(), steps=2)
    scored = batches_of(loop, 2).loader
    assert scored.size == 2 * 64 + 24 * 4
    batch = scored.batch(0)
    names = [key.split("@")[0] for key in batch.keys]
    online = [row for row, name in enumerate(names) if name.startswith("0001-")]
    stored = torch.tensor([loop.store.sample(names[row]).rewards["near"] for row in online])
    assert online
    torch.testing.assert_close(batch.rewards[online], stored, rtol=1e-6, atol=1e-7)
