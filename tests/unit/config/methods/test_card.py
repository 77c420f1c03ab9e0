"""Settings of the methods, those that cannot be chosen yet included."""

from collections.abc import Iterator

import pytest

from diffexpo.algorithms import algorithm_class
from diffexpo.config.explain import find_setting, group_keys, settings
from diffexpo.config.methods import METHOD_BY_NAME, MethodConfig, carry_over, same_meaning
from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.diffusion_kto import DiffusionKtoConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.config.methods.mapo import MapoConfig
from diffexpo.config.methods.spin import SpinConfig


def descendants(base: type[MethodConfig]) -> Iterator[type[MethodConfig]]:
    for child in base.__subclasses__():
        yield child
        yield from descendants(child)


CLASSES = {
    cls.model_fields["type"].default: cls
    for cls in dict.fromkeys(descendants(MethodConfig))
    if cls.__module__.startswith("diffexpo.") and not cls.model_fields["type"].is_required()
}
NAMES = """expo diffusion_dpo spin mapo orpo sft diffusion_kto rwr diffusion_nft awm dgpo ddpo dpok d3po spo prdp
flow_grpo improvement_dpo guidance_distillation python"""


def test_every_planned_method_has_settings_and_only_those_with_a_class_can_be_chosen() -> None:
    assert set(CLASSES) == set(NAMES.split())
    assert all(algorithm_class(name) for name in METHOD_BY_NAME)
    assert all(CLASSES[name] is cls for name, cls in METHOD_BY_NAME.items())


@pytest.mark.parametrize("name", CLASSES)
def test_settings_have_defaults_texts_and_read_back(name: str) -> None:
    cls = CLASSES[name]
    assert cls.__doc__
    bare = [key for key, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not bare, f"settings without a docstring below them: {bare}"
    values = cls()
    assert values.type == name
    assert cls.model_validate(values.model_dump(mode="json")) == values
    assert next(iter(cls.model_fields)) == "type"


def test_methods_of_the_forward_process_choose_their_times() -> None:
    on_trajectories = {"ddpo", "dpok", "d3po", "spo", "prdp", "flow_grpo"}
    assert {name for name, cls in CLASSES.items() if not issubclass(cls, ForwardConfig)} == on_trajectories
    assert all(CLASSES[name]().timestep_range == (0.0, 1.0) for name in set(CLASSES) - on_trajectories)


@pytest.mark.parametrize(
    ("first", "second", "name", "expected"),
    [
        (ExpoConfig, DiffusionDpoConfig, "beta", True),
        (ExpoConfig, SpinConfig, "beta", True),
        (ExpoConfig, SpinConfig, "reference", True),
        (ExpoConfig, MapoConfig, "beta", False),
        (DiffusionKtoConfig, ExpoConfig, "beta", False),
        (DiffusionKtoConfig, ExpoConfig, "reference", True),
        (ExpoConfig, MapoConfig, "timestep_range", True),
        (ExpoConfig, DiffusionDpoConfig, "alpha", False),
        (MapoConfig, ExpoConfig, "nonsense", False),
    ],
)
def test_a_setting_means_the_same_where_it_is_inherited_from_one_class(
    first: type[MethodConfig], second: type[MethodConfig], name: str, expected: bool
) -> None:
    assert same_meaning(first, second, name) is expected
    assert same_meaning(second, first, name) is expected


def test_values_that_mean_the_same_are_carried_over() -> None:
    expo = ExpoConfig(beta=7.0, alpha=0.5, kind="ipo", uncertainty="optimism", empty_prompt_fraction=0.0)
    assert carry_over(expo, DiffusionDpoConfig, uncertainty="off") == DiffusionDpoConfig(
        beta=7.0, kind="ipo", empty_prompt_fraction=0.0
    )
    assert carry_over(expo, SpinConfig) == SpinConfig(beta=7.0, reference="base", empty_prompt_fraction=0.0)
    assert carry_over(expo, MapoConfig) == MapoConfig(empty_prompt_fraction=0.0)


def test_settings_know_their_methods() -> None:
    alpha, source = find_setting("algorithm.alpha"), find_setting("offline.source")
    assert alpha is not None and source is not None
    assert (alpha.methods, alpha.label) == (("expo",), "algorithm.alpha (expo)")
    assert (source.methods, source.label) == ((), "offline.source")
    assert find_setting("algorithm.alpha", "diffusion_dpo") is None
    assert "alpha" in group_keys("algorithm") and "alpha" not in group_keys("algorithm", "diffusion_dpo")
    choice = next(setting for setting in settings() if setting.path == "algorithm.type")
    assert (choice.expected, choice.default) == (f"one of {', '.join(METHOD_BY_NAME)}", "expo")
