"""Minutes of a run grow with its work and shrink with the machine's speed."""

import pytest

from diffexpo.config import load_config
from diffexpo.estimate import minutes
from diffexpo.estimate.minutes import minutes_here


def test_minutes_are_work_over_speed(monkeypatch):
    monkeypatch.setattr(minutes, "speed", lambda config: 1e9)
    config = load_config(["scenes/quick"], [], {}).config
    once = minutes_here(config)
    longer = load_config(
        ["scenes/quick"], ["training.steps=32", "explore.prompts_per_iteration=320"], {}
    ).config
    assert once < minutes_here(longer) < 2 * once
    monkeypatch.setattr(minutes, "speed", lambda config: 2e9)
    assert minutes_here(config) == pytest.approx(once / 2)


def test_speed_is_a_matrix_products():
    assert 1e8 < minutes.speed(load_config(["scenes/quick"], ["model.device=cpu"], {}).config) < 1e15
