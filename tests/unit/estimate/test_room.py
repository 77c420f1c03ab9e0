"""A run that has no room says so before it loads anything."""

from __future__ import annotations

import pytest

from diffexpo.config import RunConfig, load_config
from diffexpo.errors import ConfigError
from diffexpo.estimate.memory import CONTEXT, USABLE
from diffexpo.estimate.resources import estimate
from diffexpo.estimate.room import check_room
from tests.tiny import tiny_diffusion
from tests.unit.assembly.test_prompts import Lines

# Nothing is left that would make it smaller.
SMALLEST = [
    "explore.batch_size=1",
    "training.micro_batch_size=1",
    "training.gradient_checkpointing=true",
    "training.pair_gradient=two_pass",
    "training.mixed_precision=bf16",
    "tuning={kind: lora, lora: {rank: 1}}",
    "rewards=[{name: size, type: jpeg_compressibility}]",
    "evaluation.judges=[]",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tiny_diffusion(tmp_path_factory.mktemp("room") / "model")
    return ["model.device=cpu", "model.vae_slicing=true", f"model.path={folder}"]


def needed(config: RunConfig) -> int:
    """Free bytes with which a run just fits."""
    return int((estimate(config).total + CONTEXT) / USABLE)


def test_enough_room_says_nothing_and_the_cpu_is_not_asked(settings: list[str]) -> None:
    config = load_config(["emoji/quick"], settings, {}).config
    console = Lines()
    check_room(config, console)
    check_room(config, console, lambda device: needed(config) + 1)
    assert console.warnings == []


def test_activations_that_may_not_fit_are_a_warning_with_settings_that_would(settings: list[str]) -> None:
    config = load_config(["emoji/quick"], settings, {}).config
    console = Lines()
    check_room(config, console, lambda device: needed(config) - 2**20)
    (warning,) = console.warnings
    assert warning.startswith("this run may not have room: about ") and "--set " in warning


def test_weights_that_cannot_fit_are_refused(settings: list[str]) -> None:
    config = load_config(["emoji/quick"], [*settings, *SMALLEST], {}).config
    with pytest.raises(ConfigError, match=r"no room for this run: .*GiB free; nothing that this version"):
        check_room(config, Lines(), lambda device: 2**20)


def test_a_model_of_unknown_size_is_left_to_loading(settings: list[str]) -> None:
    config = load_config(["emoji/quick"], [*settings, "model.path=somebody/something"], {}).config
    check_room(config, Lines(), lambda device: 1)
