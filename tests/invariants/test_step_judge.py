"""A tiny SPO run with a tiny step judge, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffexpo import assembly
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.errors import ConfigError
from tests.invariants.conftest import diffexpo, weights
from tests.invariants.test_rollout import DDIM, RECIPE
from tests.tiny_step_judge import tiny_step_judge

SPO = "{{type: spo, num_candidates: 2, first_transition: 1, threshold: 0.0, judge: {judge}}}"


def write_recipe(world: Path, judge: Path | str) -> Path:
    path = world / "spo_judged.yaml"
    text = RECIPE.format(
        model=world / "model", root=world, sampler=DDIM, algorithm=SPO.format(judge=judge), evaluated="ddim"
    )
    path.write_text(text)
    return path


def run(recipe: Path, folder: Path, *settings: str, stop_after: str | None = None) -> Path:
    loaded = load_config([str(recipe)], ["explore.iterations=2", *settings])
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=folder.exists(),
        console=Console(),
        stop_after=stop_after,
    )
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_step_judge(tmp_path_factory.mktemp("judges") / "judge")


def test_a_run_under_a_step_judge_is_the_same_in_one_go_and_stage_by_stage(world, judge, tmp_path):
    recipe = write_recipe(world, judge)
    whole = run(recipe, tmp_path / "whole", stop_after="train-2")
    for stage in ("collect-1", "collect-2", "train-2"):
        parts = run(recipe, tmp_path / "parts", stop_after=stage)
    assert weights(parts) == weights(whole)
    assert len(set(weights(whole).values())) == 2
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kept = [row["pairs/kept_fraction"] for row in rows if "pairs/kept_fraction" in row]
    assert kept == [1.0, 1.0]  # threshold 0 and no two candidates of equal score
    # The rewards rank nothing any more: other pairs are learned from.
    other = run(recipe, tmp_path / "other", "algorithm.judge=null", stop_after="train-2")
    assert set(weights(other).values()).isdisjoint(weights(whole).values())


def test_a_judge_that_does_not_fit_is_refused_before_anything_is_spent(world, tmp_path):
    for name, changes, match in (
        ("eight", {"channels": 8}, "reads latents 8x8x8, but .* has 4x8x8"),
        ("flow", {"paths": ("flow",)}, "states of flow models, but .* is a vp model"),
    ):
        recipe = write_recipe(world, tiny_step_judge(tmp_path / name, **changes))
        with pytest.raises(ConfigError, match=match):
            run(recipe, tmp_path / f"run-{name}")
        assert not (tmp_path / f"run-{name}" / "store").exists()
    done = diffexpo(
        "run", str(write_recipe(world, tmp_path / "nowhere")), "--out", str(tmp_path / "run"), check=False
    )
    assert (
        done.code == 3 and "algorithm.judge" in done.err and "there is no file" in done.err.replace("\n", " ")
    )
