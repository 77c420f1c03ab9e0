"""Settings of improvement DPO: what is refused with which reason, and that a group within a method is a group like others."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo import assembly
from diffexpo.config import load_config
from diffexpo.errors import ConfigError

BASE = ["algorithm.type=improvement_dpo", "explore.agents=1", "explore.sampler.guidance=2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["offline.source=null"], "algorithm.improver.path"),
        (["explore.iterations=1"], "use two iterations or more"),
        (["explore.agents=2"], "set explore.agents=1"),
        (["algorithm.uncertainty=optimism"], "set uncertainty: off"),
        (["algorithm.filter_by_reward=true", "rewards=[]"], "nothing can filter"),
        (["algorithm.improver.task_probabilities=[0.5, 0.1, 0.1]"], "add up to 0.7"),
        (["algorithm.improver={batch_size: 9, micro_batch_size: 2}"], "does not divide"),
        (["algorithm.improver.stepps=3"], "algorithm.improver.steps"),
        (["algorithm.improver.text_scale=-1"], "expected a number >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [*BASE, *settings], {})
    assert message in str(caught.value)


def test_a_given_model_needs_no_offline_pairs_and_no_rewards() -> None:
    loaded = load_config(
        [], [*BASE, "offline.source=null", "algorithm.improver.path=some/folder", "rewards=[]"], {}
    )
    assert loaded.config.algorithm.improver.path == "some/folder"


def test_settings_of_the_group_come_in_any_layer_and_know_their_origin(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("algorithm: {type: improvement_dpo, improver: {steps: 7}}\nexplore: {agents: 1}\n")
    loaded = load_config([recipe], ["algorithm.improver.text_scale=2"], {})
    improver = loaded.config.algorithm.improver
    assert (improver.steps, improver.text_scale, improver.image_scale) == (7, 2.0, 3.0)
    assert loaded.sources["algorithm.improver.steps"] == str(recipe)
    assert loaded.sources["algorithm.improver.text_scale"] == "--set algorithm.improver.text_scale=2"
    assert loaded.sources["algorithm.improver.image_scale"] == "default"


def test_the_group_is_refused_where_no_method_has_it() -> None:
    with pytest.raises(ConfigError, match="algorithm.improver"):
        load_config([], ["algorithm.improver.steps=4"], {})


@pytest.mark.parametrize(("weight", "expected"), [(0.0, False), (0.5, True)])
def test_offline_pairs_train_the_model_itself_only_by_weight(weight: float, expected: bool) -> None:
    loaded = load_config([], [*BASE, f"hybrid.offline_weight={weight}"], {})
    assert loaded.config.algorithm.learns_from_offline(loaded.config) is expected


@pytest.mark.parametrize("recipe", ["emoji/improvement_dpo", "paper/improvement_dpo_sd15"])
def test_the_plan_of_a_recipe_names_its_stages(recipe: str) -> None:
    config = load_config([recipe], (), {}).config
    plan = dict(assembly.plan(config))
    assert plan["improver-0"].endswith("offline pairs") and "image scale 3" in plan["improve-1"]
    assert f"improve-{config.explore.iterations}" not in plan and f"train-{config.explore.iterations}" in plan
