"""Settings of scorers: what a type needs, what it would not read, which mixtures a method can use."""

from __future__ import annotations

import pytest

from diffexpo.config import load_config
from diffexpo.config.schema import RewardConfig
from diffexpo.config.scorers import SCORERS
from diffexpo.errors import ConfigError

TWO = "rewards=[{name: a, type: clip, path: emoji:judge_train}, {name: b, type: jpeg_compressibility}]"


def load(*overrides: str):
    return load_config([], overrides, {}).config


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("type: hpsv2", "rewards.0.path is empty: type hpsv2 needs HPS_v2_compressed"),
        ("type: imagereward", "rewards.0.path is empty: type imagereward needs ImageReward"),
        ("type: aesthetic", "rewards.0.path is empty: type aesthetic needs the head"),
        ("type: aesthetic, path: x, scale: raw", "rewards.0.scale = raw: type aesthetic has its own unit"),
        (
            "type: jpeg_compressibility, base: x",
            "rewards.0.base = 'x': type jpeg_compressibility stands on no",
        ),
        (
            "type: python, path: 'a.py:f', precision: float16",
            "type python holds no network; remove precision",
        ),
        ("type: clip, path: x, base: y", "rewards.0.base = 'y': type clip stands on no other model"),
    ],
)
def test_settings_that_a_type_needs_or_ignores(reward: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"rewards=[{{name: a, {reward}}}]")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "reward",
    [
        "type: pickscore",
        "type: pickscore, path: a, base: b, scale: raw, precision: bfloat16",
        "type: hpsv2.1, path: a.safetensors, scale: logit",
        "type: imagereward, path: a, base: b, precision: float16",
        "type: aesthetic, path: a, base: b",
    ],
)
def test_settings_that_make_sense_pass(reward: str) -> None:
    assert load(f"rewards=[{{name: a, {reward}}}]").rewards[0].name == "a"


def test_facts_are_whole() -> None:
    for name, facts in SCORERS.items():
        assert facts.what and facts.unit and facts.needs and facts.licence, name
        assert bool(facts.default_path) <= bool(facts.path) and bool(facts.default_base) <= bool(facts.base)
        assert set(facts.scales) in (set(), {"raw", "percent", "logit"})
        RewardConfig(name="a", type=name)


def test_global_mixture_needs_all_prompts_at_once() -> None:
    assert load(TWO, "mixture.kind=global").mixture.kind == "global"
    spo = ["algorithm.type=spo", "offline.source=null", "explore.agents=1", "explore.sampler.eta=1"]
    spo += ["explore.sampler.name=ddim", "mixture.kind=global", "baseline.offline_dpo=false"]
    with pytest.raises(ConfigError, match="mixture.kind = global with algorithm.type = spo"):
        load(TWO, *spo)
