"""People score no single image: whoever asks for a score is told so, and none is made up."""

from __future__ import annotations

import pytest
import torch

from diffexpo.config.rewards import read_card
from diffexpo.errors import ConfigError, RewardError
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.human import HumanVotes


def test_no_number_is_made_up() -> None:
    with pytest.raises(RewardError, match="asks people, who compare images and score none"):
        HumanVotes("people").score(torch.zeros(1, 3, 8, 8), ["a cat"])


def test_people_are_not_loaded_as_a_scorer() -> None:
    with pytest.raises(
        ConfigError, match="asks people, who compare what a run drew.*neither served nor verified"
    ):
        load_rewards([read_card(type="human")], str, "cpu")
