"""A method that cannot learn from what a run would collect is refused with its settings, before a model is loaded."""

from __future__ import annotations

import pytest

from diffexpo.config import check_combinations, load_config
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.run import RunConfig
from diffexpo.errors import ConfigError


class ComparesEight(DiffusionDpoConfig):
    group_size = 8


def check(*overrides: str) -> None:
    config: RunConfig = load_config([], overrides, {}).config
    check_combinations(config.model_copy(update={"algorithm": ComparesEight()}))


def test_too_few_images_of_a_prompt_are_refused_with_the_number_that_does() -> None:
    check("explore.images_per_prompt=4")
    with pytest.raises(ConfigError, match=r"= 3 gives 6 images.* compares 8 or more.*images_per_prompt=4"):
        check("explore.images_per_prompt=3")
    # Nothing is collected in a single iteration: the offline pairs are what they are.
    check("explore.images_per_prompt=3", "explore.iterations=1")
