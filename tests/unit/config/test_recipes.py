"""The recipes with the papers' settings: they load, plan, and fit on the cards that their headers name."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recipe_cards import card_settings
from diffexpo.assembly.runs import plan
from diffexpo.config import list_recipes, load_config
from diffexpo.estimate.resources import estimate

NAMES = [recipe.name for recipe in list_recipes() if recipe.name.startswith("paper/")]
PATHS = {recipe.name: recipe.path for recipe in list_recipes()}
WITH_CARDS = [name for name in NAMES if name != "paper/improvement_dpo_sd15"]
# These share two measurements; larger networks take up to half a minute each: benchmarks/recipe_cards.py checks all of them.
QUICK = [f"paper/{name}_sd15" for name in ("expo_i", "expo_ii", "expo_ii_m", "dpo_offline")]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_and_plans_without_the_model(name: str, tmp_path: Path) -> None:
    config = load_config([name], [], {}).config
    assert config.name == name.rpartition("/")[2]
    collected = [config.explore.sampler] if config.algorithm.collects(config) else []
    assert len({sampler.name.startswith("flow") for sampler in (config.evaluation.sampler, *collected)}) == 1
    rows = dict(plan(config))
    assert "network evaluations" in rows["cost"] and "GiB" in rows["disk"]


@pytest.mark.parametrize("name", WITH_CARDS)
def test_every_header_names_three_cards_and_says_it_is_an_estimate(name: str) -> None:
    assert list(card_settings(name)) == [12, 24, 80]
    assert f"Estimate (`diffexpo estimate {name}`)" in PATHS[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_recipe_fits_the_cards_of_its_header(name: str) -> None:
    for card, settings in card_settings(name).items():
        config = load_config([name], settings or [], {}).config
        assert estimate(config).fits(card) is (settings is not None), f"{card} GB"


def test_papers_numbers_of_expo() -> None:
    first, second, several = (
        load_config([f"paper/expo_{name}_sd15"], [], {}).config for name in ("i", "ii", "ii_m")
    )
    for config in (first, second, several):
        explore, training = config.explore, config.training
        assert (explore.iterations, explore.prompts_per_iteration, explore.images_per_prompt) == (5, 20480, 4)
        assert (explore.sampler.name, explore.sampler.steps, explore.sampler.guidance) == ("ddpm", 50, 7.5)
        assert (training.steps, training.warmup_fraction, config.algorithm.beta) == (2000, 0.25, 5000.0)
        assert training.learning_rate == pytest.approx(1e-8 * training.batch_size)
        assert config.offline.limit == 81920 == 4 * explore.prompts_per_iteration
    assert (first.explore.agents, second.explore.agents) == (1, 2)
    assert [reward.type for reward in several.rewards] == ["pickscore", "hpsv2.1"]


def test_updates_see_what_the_authors_updates_see() -> None:
    """Transitions, or rows, of an update: the images of an epoch times their trained steps over the number of updates."""
    ddpo = load_config(["paper/ddpo_sd15"], [], {}).config
    assert ddpo.training.steps * ddpo.training.batch_size == 256 * 50
    for name, drawers in (("flow_grpo_sd35m", 1), ("nft_sd35m", 2)):
        config = load_config([f"paper/{name}"], [], {}).config
        images = config.explore.prompts_per_iteration * config.explore.images_per_prompt * drawers
        assert images == 48 * 24
        assert config.training.steps * config.training.batch_size == images * 9
    offline = load_config(["paper/dpo_offline_sd15"], [], {}).config
    assert offline.training.learning_rate == pytest.approx(1e-8 * offline.training.batch_size)
