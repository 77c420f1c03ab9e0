"""The group reward for balance: its formula, its slope, and what it leaves out."""

from __future__ import annotations

import math

import pytest
import torch

from diffexpo.errors import RewardError
from diffexpo.rewards.balance import BalanceReward, balance_rewards
from diffexpo.rewards.classifier import fill_text, value_probabilities


class Red:
    """Says how red an image is, for texts that end in red, else how blue."""

    name, version, scale = "red", "1", "logit"

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if any("unreadable" in prompt for prompt in prompts):
            raise RewardError("cannot read this")
        channel = torch.tensor([0 if prompt.endswith("red") else 2 for prompt in prompts])
        return images.mean(dim=(2, 3))[torch.arange(len(prompts)), channel] * 50


VALUES = {"red": "a {noun} that is red", "blue": "a {noun} that is blue"}


def images(*channels: int) -> torch.Tensor:
    found = torch.zeros(len(channels), 3, 4, 4)
    for row, channel in enumerate(channels):
        found[row, channel] = 1.0
    return found


def test_the_worked_value() -> None:
    p = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]], dtype=torch.float64)
    found = balance_rewards(p, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.tolist() == pytest.approx([-math.log(1.4)] * 3 + [-math.log(0.6)], abs=1e-12)


def test_it_is_the_slope_of_the_divergence_from_the_target() -> None:
    """d/dw_i of (n + 1) KL(m || u), with w_i the weight of image i: minus the reward, up to one constant for all."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(5, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    target = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
    mass = target + weights @ p
    mix = mass / mass.sum()
    (mass.sum().detach() * (mix * torch.log(mix / target)).sum()).backward()
    assert weights.grad is not None
    constant = weights.grad + balance_rewards(p, target)
    assert constant.tolist() == pytest.approx([float(constant[0])] * 5, abs=1e-12)


def test_images_at_the_target_are_worth_nothing_and_equal_ones_the_same() -> None:
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert balance_rewards(torch.eye(2, dtype=torch.float64), half).abs().max() < 1e-12
    same = balance_rewards(torch.tensor([[0.9, 0.1]] * 4, dtype=torch.float64), half)
    assert len(set(same.tolist())) == 1


def test_images_of_a_prompt_are_compared_with_each_other_alone() -> None:
    reward = BalanceReward("balance", Red(), VALUES)
    together = reward.score(images(0, 0, 2, 2, 0), ["a car", "a car", "a car", "a hat", "a key"])
    assert together[2] > together[0] == together[1]
    assert torch.isnan(together[3:]).all(), "an image alone is in no balance"
    assert torch.equal(reward.score(images(0, 0, 2), ["a car"] * 3), together[:3])


def test_a_target_of_ones_own() -> None:
    """Where three of four are wanted red, the fourth of four red images of which one is blue is not too rare."""
    wanted = BalanceReward("balance", Red(), VALUES, {"red": 0.75, "blue": 0.25})
    found = wanted.score(images(0, 0, 0, 2), ["a car"] * 4)
    assert found.abs().max() < 1e-6
    assert wanted.version != BalanceReward("balance", Red(), VALUES).version


def test_what_cannot_be_read_is_an_error_of_the_other_reward() -> None:
    with pytest.raises(RewardError, match="cannot read this"):
        BalanceReward("balance", Red(), VALUES).score(images(0, 2), ["an unreadable"] * 2)


def test_texts_of_values() -> None:
    assert fill_text("a woman {noun}", "a judge") == "a woman judge"
    assert fill_text("{prompt}, a woman", "An astronaut") == "An astronaut, a woman"
    assert fill_text("a {noun}", "the apple") == "a apple" and fill_text("a {noun}", "theatre") == "a theatre"


def test_probabilities_sum_to_one_and_a_missing_score_is_none() -> None:
    found = value_probabilities(Red(), VALUES, images(0, 2), ["a car"] * 2, temperature=10.0)
    assert found.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert found[0, 0] == pytest.approx(1 / (1 + math.exp(-5))) == found[1, 1]

    class Broken(Red):
        def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return torch.tensor([math.nan, 1.0])

    assert torch.isnan(value_probabilities(Broken(), VALUES, images(0, 2), ["a car"] * 2)).all(
        dim=1
    ).tolist() == [True, False]
