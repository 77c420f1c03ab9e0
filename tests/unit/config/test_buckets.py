"""Settings of several sizes: how they are written, and what is refused with them."""

from __future__ import annotations

import pytest

from diffexpo.bounded.yaml_texts import parse_yaml
from diffexpo.config import RunConfig, config_to_yaml, load_config
from diffexpo.errors import ConfigError

BUCKETS = "model.buckets=[[48, 80], 4:3]"
OFFLINE = "offline.source=emoji:offline"


def load(*overrides: str) -> RunConfig:
    return load_config([], overrides, {}).config


def test_sizes_and_aspect_ratios_stand_in_one_list() -> None:
    config = load(BUCKETS)
    assert config.model.buckets == ((48, 80), "4:3") and config.explore.aspect == "first"
    assert parse_yaml("[16:9, '16:9', 9, 0x10, 1_000, 010]", "here") == ["16:9", "16:9", 9, 16, 1000, 8]
    again = RunConfig.model_validate(parse_yaml(config_to_yaml(config), "here"))
    assert again == config


@pytest.mark.parametrize(
    "value", ["[[48]]", "[0:3]", "[a:b]", "[48]", "[[48, 0]]", "[[48, 80, 3]]", "square"]
)
def test_what_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.buckets"):
        load(f"model.buckets={value}")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["explore.aspect=uniform"], "there is one size only"),
        ([BUCKETS, "offline.source=null"], "no image would have another size"),
        ([BUCKETS, "offline.source=null", "explore.aspect=offline"], "no offline winners"),
        ([BUCKETS, "explore.aspect=uniform", "explore.iterations=1"], "no image is drawn for training"),
        (
            [BUCKETS, "algorithm.type=spin", "explore.agents=1", "hybrid.offline_weight=0", "hybrid.decay=0"],
            "would differ in shape within a pair; leave model.buckets empty",
        ),
        (
            [BUCKETS, "algorithm.type=improvement_dpo", "explore.agents=1", "explore.aspect=uniform"],
            "latents of one shape; leave",
        ),
        (
            [
                BUCKETS,
                "algorithm.type=spo",
                "algorithm.judge=x",
                "offline.source=null",
                "explore.aspect=uniform",
            ],
            "algorithm.judge was trained on latents of one shape; set algorithm.judge=null .* or leave model.buckets empty",
        ),
        (
            [BUCKETS, "algorithm.type=dpok", "offline.source=null", "explore.aspect=uniform"],
            "set algorithm.has_value_baseline=false, or leave",
        ),
        (
            [BUCKETS, "explore.aspect=uniform", "rewards=[{name: d, type: denoising}]"],
            r"rewards.0.type = denoising .* judges latents of the first size only",
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [BUCKETS],
        [BUCKETS, "explore.aspect=offline"],
        [BUCKETS, "offline.source=null", "explore.aspect=uniform"],
        [BUCKETS, "rewards=[{name: d, type: denoising}]"],
    ],
)
def test_what_can_be_learned_passes(overrides: list[str]) -> None:
    assert load(*overrides).model.buckets
