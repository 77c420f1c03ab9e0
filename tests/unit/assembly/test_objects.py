"""A method that cannot learn from what a run would collect is refused before a model is loaded."""

from __future__ import annotations

import pytest

from diffexpo.algorithms import ALGORITHMS, DiffusionDpo
from diffexpo.assembly.objects import check_algorithm
from diffexpo.config import load_config
from diffexpo.errors import ConfigError
from diffexpo.online.iterate import LOADERS


class ComparesEight(DiffusionDpo):
    group_size = 8


class LearnsFromNothingKnown(DiffusionDpo):
    batch_type = dict


def config(*overrides: str):
    return load_config([], overrides, {}).config


@pytest.mark.parametrize("name", [name for name, cls in ALGORITHMS.items() if cls.batch_type in LOADERS])
def test_the_smallest_run_of_every_method_that_learns_from_images_passes(name: str) -> None:
    algorithm = ALGORITHMS[name]
    images = -(-algorithm.group_size // 2)
    check_algorithm(config(f"explore.images_per_prompt={images}"), algorithm)


def test_too_few_images_of_a_prompt_are_refused_with_the_number_that_does() -> None:
    check_algorithm(config("explore.images_per_prompt=4"), ComparesEight)
    with pytest.raises(ConfigError, match=r"= 3 gives 6 images.* compares 8 or more.*images_per_prompt=4"):
        check_algorithm(config("explore.images_per_prompt=3"), ComparesEight)
    # Nothing is collected in a single iteration: the offline pairs are what they are.
    check_algorithm(config("explore.images_per_prompt=3", "explore.iterations=1"), ComparesEight)


def test_a_method_on_batches_that_no_loop_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="learns from dict, which no loop gives.*PairBatch"):
        check_algorithm(config(), LearnsFromNothingKnown)
