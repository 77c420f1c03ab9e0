"""Training by name refuses what it does not know."""

from __future__ import annotations

import math

import pytest

from diffexpo.errors import ConfigError, MissingError
from worlds.emoji.train import train


def test_training_refuses_what_it_does_not_know(tmp_path) -> None:
    with pytest.raises(ConfigError, match="judge_heldout"):
        train("judge", 1, tmp_path, 0)
    with pytest.raises(ConfigError, match="minutes"):
        train("vae", math.nan, tmp_path, 0)
    with pytest.raises(MissingError, match="autoencoder"):
        train("flow", 1, tmp_path, 0, vae=tmp_path)
