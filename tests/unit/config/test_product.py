"""Several values of a setting as runs: every combination once, with a name, or a message."""

from __future__ import annotations

import pytest

from diffexpo.config.product import load_product, named_values, split_values
from diffexpo.errors import ConfigError, MissingError


def test_every_combination_comes_once_and_the_last_setting_varies_fastest() -> None:
    found = named_values(["seed=0,1", "algorithm.beta=5,6,7", "training.steps=3"])
    assert [name for name, _ in found] == [
        f"seed-{seed}_beta-{beta}" for seed in (0, 1) for beta in (5, 6, 7)
    ]
    assert found[1][1] == ("seed=0", "algorithm.beta=6", "training.steps=3")
    assert named_values([]) == [("run", ())] and named_values(["seed=3"]) == [("run", ("seed=3",))]


def test_commas_inside_of_brackets_and_quotes_belong_to_a_value() -> None:
    assert split_values("1, [2, 3], {a: [4, 5]}", "") == ["1", "[2, 3]", "{a: [4, 5]}"]
    assert split_values('"a, b",\'c,"d\'', "") == ['"a, b"', "'c,\"d'"]
    assert split_values("", "") == [""] and split_values("null,off", "") == ["null", "off"]


def test_names_are_fit_for_folders_and_tell_combinations_apart() -> None:
    names = [name for name, _ in named_values(["model.path=a/b:c,../d", "tuning.start=x y,x/y"])]
    assert names == ["1-path-a-b-c_start-x-y", "2-path-a-b-c_start-x-y"] + [
        "3-path-..-d_start-x-y",
        "4-path-..-d_start-x-y",
    ]
    assert named_values(["a.beta=1,2", "b.beta=3,4"])[0][0] == "a.beta-1_b.beta-3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "has no value"),
        (["=1,2"], "has no value"),
        (["seed=1,,2"], "a value is empty"),
        (["seed=1,2,1"], "1 stands there twice"),
        (["seed=1", "seed=2"], "set twice"),
        (["evaluation.base_guidances=[1,2"], "not closed"),
    ],
)
def test_what_makes_no_product_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named_values(overrides)


def test_settings_of_all_combinations_are_checked_and_named() -> None:
    found = load_product(["scenes/quick"], ["seed=0,1", "algorithm.beta=100,200"])
    assert [(one.config.seed, one.config.algorithm.beta) for one in found] == [
        (seed, beta) for seed in (0, 1) for beta in (100.0, 200.0)
    ]
    assert found[3].config.name == "scenes_quick-seed-1_beta-200" and found[3].recipe == "scenes_quick"
    assert load_product(["scenes/quick"], ["name=mine", "seed=0,1"])[1].config.name == "mine-seed-1"
    with pytest.raises(ConfigError, match=r"seed-0_bta-1: algorithm.bta is not a setting.*algorithm.beta"):
        load_product(["scenes/quick"], ["seed=0,1", "algorithm.bta=1,2"])
    with pytest.raises(ConfigError, match="no recipe given"):
        load_product([], ["seed=0,1"])
    with pytest.raises(MissingError):
        load_product(["scenes/quik"], [])
