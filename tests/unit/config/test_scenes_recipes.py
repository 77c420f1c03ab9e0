"""The recipes of scenes: they plan through the command, train on one checker and are judged by the other, within a few CPU minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods_learn import METHODS
from diffexpo.cli.main import main
from diffexpo.config import list_recipes, load_config
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.online.cost import run_cost

NAMES = [recipe.name for recipe in list_recipes() if recipe.name.startswith("scenes/")]
DEFAULT_RUNS = ("scenes/expo", "scenes/distil", "scenes/expo_multi", "scenes/dpo_offline")
"""As long as what `make run` does and compares, where it starts included; the others show that a method learns."""
SMALL = [name for name in NAMES if name.partition("/")[2] in METHODS and name not in DEFAULT_RUNS]
MOST_EVALUATIONS = 110_000
"""Network evaluations that an older core does within eight minutes (about 230 a second)."""


FIRST = {"scenes/expo_implicit": "runs/scenes_dpo_offline"}
"""Recipes that stand on a run, which has to be made first."""


@pytest.mark.parametrize("name", FIRST)
def test_a_recipe_that_needs_a_run_names_it_where_it_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["run", name, "--dry-run"])
    assert caught.value.code == 3
    told = capsys.readouterr().err
    assert f"there is no {FIRST[name]} in {tmp_path}; expected a run that was trained on pairs" in told
    assert "hub" not in told


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIRST])
def test_recipe_passes_a_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["run", name, "--dry-run"])
    assert caught.value.code in (None, 0)
    assert "nothing was run (--dry-run)" in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_on_one_checker_and_is_judged_by_the_other(name: str) -> None:
    config = load_config([name], [], {}).config
    assert config.name == name.replace("/", "_")
    assert config.model.path.startswith("scenes:")
    assert config.prompts.source in ("scenes:train", "scenes:people")
    assert config.evaluation.prompts == "scenes:heldout"
    judge, scorers = config.evaluation.judges[0], {reward.path for reward in config.rewards}
    assert (judge.name, judge.type, judge.path) == ("correct", "scene_correct", "scenes:checker_heldout")
    assert "scenes:checker_heldout" not in scorers
    assert config.evaluation.num_prompts >= 300 and config.evaluation.sampler.guidance == 1.0


@pytest.mark.parametrize("name", SMALL)
def test_recipe_of_the_benchmark_costs_minutes(name: str) -> None:
    config = load_config([name], [], {}).config
    assert run_cost(config).total <= MOST_EVALUATIONS


def test_every_method_that_runs_on_a_diffusion_model_has_a_recipe() -> None:
    """Flow-GRPO needs a flow model."""
    found = {load_config([name], [], {}).config.algorithm.type for name in NAMES}
    assert set(METHOD_BY_NAME) - found <= {"flow_grpo", "python"}  # of python the loss is the user's
