"""Rewards that contradict each other are measured while images are collected, and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffexpo.assembly.objects import build_ranking
from diffexpo.config import load_config
from diffexpo.online.loop import keep_iterate
from diffexpo.online.stages.collect import collect
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import Drawn
from tests.learning.toy import PATHS, Silent, make_loop, online_config

REWARDS = """[
    {name: red, type: python, path: "x.py:red"}, {name: pale, type: python, path: "x.py:pale", weight: -1.0},
    {name: seen, type: python, path: "x.py:seen", role: watch}]"""


class Heard(Silent):
    """A console that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def red_and_others(drawn: Drawn, prompts: list[str]) -> dict[str, np.ndarray]:
    """`pale` orders as `red` does (its weight turns that around), `seen` the other way."""
    red = drawn.images[:, 0].mean(dim=(1, 2)).double().numpy()
    return {"red": red, "pale": red**3, "seen": -red}


def test_conflicts_stand_in_the_metrics_of_the_collection_and_are_said(tmp_path: Path) -> None:
    config = load_config([], [f"rewards={REWARDS}"], {}).config
    ranking = build_ranking(config)
    toy = online_config("vp", explore={"prompts_per_iteration": 6, "images_per_prompt": 2})
    loop = make_loop(toy, ToyPolicy(PATHS["vp"]), tmp_path, offline_pairs=4)
    heard = Heard()
    loop = replace(loop, score=red_and_others, ranking=ranking, console=heard)
    loop.policy.weights.copy("base", "reference")
    keep_iterate(loop, 1, {})
    collect(loop, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if "rollout/images" in line]
    assert found["rollout/conflict/red:pale/disagreement"] == 1.0
    assert found["rollout/conflict/red:pale/rank_correlation"] == pytest.approx(-1.0)
    assert found["rollout/conflict/red:seen/disagreement"] == 1.0
    assert found["rollout/conflict/pale:seen/disagreement"] == 0.0
    assert "iteration 1: rewards red:pale order 100% of image couples oppositely" in heard.lines


def test_one_reward_has_no_conflicts() -> None:
    assert build_ranking(load_config([], [], {}).config).conflicts({"judge_train": np.zeros((2, 3))}) == {}
