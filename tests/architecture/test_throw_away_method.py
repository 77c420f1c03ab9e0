"""A method that exists in this file alone: every room serves it from its card, and none must be told its name."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal, Union

import pytest
from pydantic import Field, create_model

from diffexpo.algorithms import algorithm_class
from diffexpo.algorithms.diffusion_dpo import diffusion_dpo_loss, pair_margin
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, error_metrics
from diffexpo.assembly.runs import plan
from diffexpo.config import RunConfig, config_to_yaml, explain, load, load_config, read_resolved
from diffexpo.config.citations import citations
from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME, METHODS, offline_baseline
from diffexpo.config.methods.bases import MarginConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.rules import check_combinations, config_notes
from diffexpo.config.section import Positive
from diffexpo.errors import ConfigError, Interrupted
from diffexpo.estimate.resources import estimate
from diffexpo.evaluation.wording import describe_method
from diffexpo.online.cost import row_cost, run_cost
from diffexpo.online.loaders import LOADERS
from diffexpo.online.loop import Loop, schedule
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import PairBatch
from tests.invariants.every_method import BATCH, make_config
from tests.invariants.test_cost_of_methods import counted, expected
from tests.learning.toy import PATHS, PROMPTS, make_loop


class ThrowAwayConfig(MarginConfig):
    """Diffusion-DPO whose beta is divided by a setting of its own."""

    type: Literal["throw_away"] = "throw_away"
    """The training method."""
    boldness: Positive = 2.0
    """Divides beta."""

    title: ClassVar[str] = "Throw-Away"
    group_size: ClassVar[int] = 3

    @property
    def initial_loss(self) -> float:
        return math.log(2)

    @property
    def start_loss(self) -> float:
        return math.log(2)

    def problems(self, run: Run) -> list[str]:
        too_bold = [f"algorithm.boldness = {self.boldness:g}: expected 10 at most"] * (self.boldness > 10)
        return [*super().problems(run), *too_bold]

    def notes(self, run: Run) -> list[str]:
        return [*super().notes(run), *["algorithm.boldness = 1 changes nothing"] * (self.boldness == 1)]


class ThrowAway(PairMethod):
    """The method of `ThrowAwayConfig`."""

    settings: ThrowAwayConfig

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        four = (errors.winner, errors.loser, errors.winner_ref, errors.loser_ref)
        beta = self.settings.beta / self.settings.boldness
        margin = pair_margin(*four, beta=beta)
        return diffusion_dpo_loss(*four, beta=beta), error_metrics(errors, margin, beta)


# The type of `RunConfig.algorithm` is made from the table when it is imported; this is what it would be.
Widened = create_model(
    "Widened",
    __base__=RunConfig,
    algorithm=(
        Annotated[Union[(*METHODS, ThrowAwayConfig)], Field(discriminator="type")],
        METHOD_BY_NAME[DEFAULT_METHOD](),
    ),
)


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The card in the table and the class in a file that is named after it."""
    module = ModuleType("diffexpo.algorithms.throw_away")
    vars(module)["ThrowAway"] = ThrowAway
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHOD_BY_NAME, "throw_away", ThrowAwayConfig)
    monkeypatch.setattr(load, "RunConfig", Widened)
    monkeypatch.setattr(explain, "RunConfig", Widened)
    explain.settings.cache_clear()
    yield
    explain.settings.cache_clear()


def loaded(*settings: str, **environment: str) -> RunConfig:
    return load_config([], ["algorithm.type=throw_away", *settings], environment).config


def toy_config(**changes: object) -> RunConfig:
    """Two iterations on a toy policy."""
    config = make_config("diffusion_dpo", BATCH)
    training = config.training.model_copy(update=changes)
    card = ThrowAwayConfig(beta=60.0)
    return config.model_copy(update={"algorithm": card, "training": training})


def test_its_settings_are_read_written_and_carried_over(tmp_path: Path) -> None:
    config = loaded("algorithm.boldness=3", DIFFEXPO_ALGORITHM__BETA="77")
    assert config.algorithm == ThrowAwayConfig(boldness=3.0, beta=77.0)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert read_resolved(tmp_path / "config.yaml").config == config
    baseline = offline_baseline(config.algorithm)
    assert (baseline.type, baseline.model_dump()["beta"]) == ("diffusion_dpo", 77.0)


def test_its_settings_are_explained() -> None:
    listed = {setting.label: setting for setting in explain.settings()}
    own = listed["algorithm.boldness (throw_away)"]
    assert (own.expected, own.default, own.text) == ("a number > 0", 2.0, "Divides beta.")
    assert "throw_away" in listed["algorithm.type"].expected
    shared = explain.find_setting("algorithm.beta", "throw_away")
    assert shared is not None and {"expo", "throw_away"} <= set(shared.methods)
    with pytest.raises(ConfigError, match="not a setting of expo.*belongs to throw_away"):
        load_config([], ["algorithm.boldness=3"], {})
    with pytest.raises(ConfigError, match=r"Did you mean algorithm\.boldness"):
        loaded("algorithm.boldnes=3")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("algorithm.boldness=11", r"algorithm\.boldness = 11: expected 10 at most"),
        ("algorithm.boldness=0", r"algorithm\.boldness = 0 .*expected a number > 0"),
        ("algorithm.timestep_range=[0.5, 0.2]", "holds no time"),
        ("explore.images_per_prompt=1", r"algorithm\.type = throw_away compares 3 or more"),
        ("rewards=[]", "no reward with role: train"),
    ],
)
def test_wrong_settings_are_refused(setting: str, complaint: str) -> None:
    check_combinations(loaded())
    with pytest.raises(ConfigError, match=complaint):
        loaded(setting)


def test_its_notes_are_told() -> None:
    note = "algorithm.boldness = 1 changes nothing"
    assert note in config_notes(loaded("algorithm.boldness=1"))
    assert note not in config_notes(loaded())


def test_its_papers_are_cited_and_without_any_it_is_listed_as_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = citations(loaded())
    assert found.unknown[0] == "method Throw-Away"
    assert not any("Throw-Away" in purpose for one in found.known for purpose in one.purposes)
    monkeypatch.setattr(ThrowAwayConfig, "papers", ("wallace2024diffusiondpo",))
    found = citations(loaded())
    assert (found.known[0].work.key, found.known[0].purposes) == (
        "wallace2024diffusiondpo",
        ("method Throw-Away",),
    )
    assert "method Throw-Away" not in found.unknown


def test_a_report_speaks_of_it() -> None:
    method = describe_method(loaded().model_dump(mode="json"))
    assert (method.name, method.card.restraint) == ("Throw-Away", "raise algorithm.beta")
    assert method.story == "two agents draw images, rewards rank them, the model learns from best and worst."
    assert method.first_iterate.startswith("Throw-Away 1 is trained on the given offline pairs")
    assert method.label("iteration-2") == "Throw-Away 2" and method.card.start_loss == math.log(2)
    assert (
        method.card.has_pairs
        and method.has_agents
        and method.compares_offline
        and not method.card.draws_first
    )


def test_what_it_takes_is_estimated_and_planned() -> None:
    joint, halves = loaded(), loaded("training.pair_gradient=two_pass")
    assert (row_cost(joint), row_cost(halves)) == (8, 10)
    training, iterations = joint.training, joint.explore.iterations
    assert run_cost(joint).training == iterations * training.steps * training.batch_size * 8
    sizes = [estimate(config) for config in (joint, halves)]
    assert sizes[0].total >= sizes[1].total > 0 and sizes[0].cost == run_cost(joint)
    rows = dict(plan(joint))
    assert [f"{stage}-{iteration}" for stage, iteration in schedule(joint)] == [
        name for name in rows if name.rpartition("-")[2].isdecimal()
    ]
    assert rows["train-1"] == f"{training.steps} steps x {training.batch_size} pairs"
    assert rows["pair-1"] == "best and worst of each prompt"
    assert rows["cost"].startswith(f"{run_cost(joint).total:,} network evaluations")


def test_its_class_its_batches_and_its_stages_are_found() -> None:
    card = ThrowAwayConfig()
    assert algorithm_class("throw_away") is ThrowAway and "throw_away" in METHOD_BY_NAME
    assert type(card.data) in LOADERS and {*card.first_stages, *card.stages} <= {*STAGES, "evaluate"}


@pytest.mark.parametrize("gradient", ["joint", "two_pass"])
def test_every_call_of_the_denoiser_is_declared(
    gradient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(pair_gradient=gradient)
    found = counted(config, tmp_path, monkeypatch)
    assert found == expected(config)
    assert sum(found.values()) == run_cost(config).total > 0


def make_toy_loop(folder: Path) -> Loop:
    loop = make_loop(toy_config(), ToyPolicy(PATHS["vp"]), folder, offline_pairs=24)
    loop.prompts = PROMPTS[:6]
    return loop


def test_a_run_that_is_stopped_twice_ends_with_the_weights_of_one_that_is_not(tmp_path: Path) -> None:
    stages = {**STAGES, "evaluate": lambda loop, iteration: None}
    whole = make_toy_loop(tmp_path / "whole")
    run_loop(whole, stages)
    run_loop(make_toy_loop(tmp_path / "parts"), stages, ("collect", 1))
    stopped, ticks = make_toy_loop(tmp_path / "parts"), 0

    def stop() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            raise Interrupted("stopped")

    stopped.check_signals = stop
    with pytest.raises(Interrupted):
        run_loop(stopped, stages)
    assert stopped.store.is_complete("pair", 1) and not stopped.store.is_complete("train", 2)
    resumed = make_toy_loop(tmp_path / "parts")
    run_loop(resumed, stages)
    ours, theirs = (loop.policy.weights.fingerprint("current") for loop in (resumed, whole))
    assert ours == theirs != whole.policy.weights.fingerprint("base")
    assert [pair.pair_id for pair in resumed.store.pairs(1)] == [
        pair.pair_id for pair in whole.store.pairs(1)
    ]
