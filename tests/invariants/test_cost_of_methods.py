"""What a method's card says that a step and a collection cost is what they evaluate: every call of the denoiser is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.methods.data import Pairs
from diffexpo.online.cost import check_cost, run_cost, sampling_cost, training_cost
from diffexpo.online.loop import run, schedule
from diffexpo.online.stages import STAGES, train
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import Conditioning
from tests.invariants.every_method import BATCH, METHODS, make_config
from tests.learning.toy import PATHS, PROMPTS, make_loop

# Toy runs of the methods; `improvement_dpo` has a second network, which is counted in test_improvement.
GUIDED = ("expo", "ddpo", "d3po", "spo", "flow_grpo")


class CountingPolicy(ToyPolicy):
    """Counts network evaluations: a row of a forward is one, and two more where a backward follows."""

    evaluations = 0

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return super().predict(x_t, t, conditioning)


def counted(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], int]:
    """Evaluations of each stage of a run, without the replay of recorded transitions, which no method declares."""
    policy = CountingPolicy(PATHS["flow" if config.explore.sampler.name.startswith("flow") else "vp"])
    loop = make_loop(config, policy, folder, offline_pairs=24 if config.offline.source else 0)
    loop.prompts = PROMPTS[:6]
    monkeypatch.setattr(train, "check_replay", lambda loop, iteration: None)
    found = {}
    for stage in schedule(config):
        policy.evaluations = 0
        run(loop, {**STAGES, "evaluate": lambda loop, iteration: None}, stage)
        found[stage] = policy.evaluations
    return found


def expected(config: RunConfig) -> dict[tuple[str, int], int]:
    """What the settings alone say that each stage costs."""
    explore, card = config.explore, config.algorithm
    images = explore.prompts_per_iteration * card.images_of_prompt(config)
    costs = {"collect": sampling_cost(config, images), "pair": 0, "evaluate": 0}
    return {
        (stage, iteration): costs[stage]
        if stage != "train"
        else training_cost(config, iteration) + check_cost(config, iteration)
        for stage, iteration in schedule(config)
    }


def with_guidance(config: RunConfig) -> RunConfig:
    sampler = config.explore.sampler.model_copy(update={"guidance": 2.0})
    return config.model_copy(update={"explore": config.explore.model_copy(update={"sampler": sampler})})


def config_of(name: str) -> RunConfig:
    """A run of a method; where groups stay whole, a batch holds a whole number of them."""
    config = make_config(name, BATCH)
    if not getattr(config.algorithm.data, "whole_groups", False):
        return config
    explore = config.explore.model_copy(update={"images_per_prompt": BATCH // 4})
    offline = config.offline.model_copy(update={"source": None})
    return config.model_copy(update={"explore": explore, "offline": offline})


@pytest.mark.parametrize("name", METHODS)
def test_every_stage_costs_what_the_card_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(name)
    found = counted(config, tmp_path, monkeypatch)
    assert found == expected(config)
    assert sum(found.values()) == run_cost(config).total


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_doubles_drawing_and_the_replay_of_transitions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, guided = make_config(name, BATCH), with_guidance(make_config(name, BATCH))
    assert counted(guided, tmp_path, monkeypatch) == expected(guided)
    assert expected(guided)["collect", 1] == 2 * expected(plain)["collect", 1]


@pytest.mark.parametrize(
    "name", [name for name in METHODS if isinstance(make_config(name, BATCH).algorithm.data, Pairs)]
)
def test_two_halves_cost_one_more_forward_of_the_policy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(name, BATCH)
    training = config.training.model_copy(update={"pair_gradient": "two_pass"})
    halves = config.model_copy(update={"training": training})
    assert counted(halves, tmp_path, monkeypatch) == expected(halves)


def test_every_method_is_counted() -> None:
    assert {str(settings["type"]) for _, settings, _ in METHODS.values()} | {"improvement_dpo"} == set(
        METHOD_BY_NAME
    )
