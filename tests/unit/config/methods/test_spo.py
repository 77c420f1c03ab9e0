"""The setting that names SPO's step-aware judge, and what follows from it without loading anything."""

import pytest

from diffexpo.config import config_notes, load_config
from diffexpo.config.explain import find_setting
from diffexpo.errors import ConfigError
from diffexpo.online.cost import sampling_cost

BASE = ["algorithm.type=spo", "offline.source=null", "explore.sampler.name=ddim", "explore.sampler.eta=1.0"]


def load(*overrides):
    return load_config([], [*BASE, *overrides], {}).config


def test_no_judge_is_the_default_and_an_empty_name_is_refused():
    assert load().algorithm.judge is None
    assert load("algorithm.judge=emoji:step_judge").algorithm.judge == "emoji:step_judge"
    for empty in ("algorithm.judge=''", "algorithm.judge='  '"):
        with pytest.raises(ConfigError, match=r"algorithm\.judge is empty.*emoji:step_judge.*null"):
            load(empty)


def test_only_spo_has_it():
    assert find_setting("algorithm.judge").methods == ("spo",)
    with pytest.raises(ConfigError, match="judge"):
        load_config([], ["algorithm.type=d3po", "offline.source=null", "algorithm.judge=x"], {})


def test_it_is_said_that_the_rewards_no_longer_rank():
    assert "only score finished images" in "\n".join(config_notes(load("algorithm.judge=emoji:step_judge")))
    assert "only score finished images" not in "\n".join(config_notes(load()))


def test_sampling_costs_what_plain_sampling_costs():
    sizes = ["explore.sampler.steps=10", "algorithm.first_transition=4", "algorithm.num_candidates=3"]
    # 10 steps x 2 for guidance; without a judge 5 of them are followed by two more candidates.
    assert sampling_cost(load(*sizes, "algorithm.judge=x"), 7) == 7 * 20
    assert sampling_cost(load(*sizes), 7) == 7 * (20 + 5 * 2 * 2)


def test_the_shipped_recipe_branches_only_where_the_rewards_can_rank():
    # docs/algorithms/spo.md: on predicted pictures the training judge is right from the fourth step on, and not before.
    config = load_config(["emoji/spo"], [], {}).config
    assert config.algorithm.judge is None and config.algorithm.first_transition == 4
