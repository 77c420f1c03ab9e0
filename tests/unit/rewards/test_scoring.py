"""Many scorers over many images: quantised once, failures counted, nothing becomes 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.errors import PolicyError, RewardError
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.python_file import PythonFileReward
from diffexpo.rewards.scoring import Budget, check_rewards, num_failed, score_drawn
from diffexpo.types import Drawn
from tests.scores import score_images

SOURCE = """
calls = []
def brightness(images, prompts):
    calls.append(len(prompts))
    return images.mean(dim=(1, 2, 3))
def pixels(images, prompts):
    return [float((image * 255 - (image * 255).round()).abs().max()) for image in images]
def picky(images, prompts):
    if "bad" in prompts:
        raise ValueError("cannot look at this")
    return [1.0 + len(prompt) for prompt in prompts]
def holes(images, prompts):
    return [float("inf") if prompt == "bad" else 2.0 for prompt in prompts]
def broken(images, prompts):
    raise RuntimeError("server is down")
"""


def rewards(tmp_path: Path, *functions: str) -> list[PythonFileReward]:
    file = tmp_path / "scorers.py"
    file.write_text(SOURCE)
    return [PythonFileReward(function, f"{file}:{function}") for function in functions]


IMAGES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "bad", "d", "e", "f", "g"]


def test_batches_do_not_change_scores_and_tick_each_time(tmp_path: Path) -> None:
    scorers = [*rewards(tmp_path, "brightness"), JpegCompressibility("jpeg")]
    ticks: list[int] = []
    whole = score_images(scorers, IMAGES, PROMPTS)
    split = score_images(scorers, IMAGES, PROMPTS, batch_size=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 2 * 3
    for name in ("brightness", "jpeg"):
        assert whole[name].dtype == np.float32
        np.testing.assert_array_equal(whole[name], split[name])


def test_scorers_see_8_bit_images(tmp_path: Path) -> None:
    scores = score_images(rewards(tmp_path, "pixels"), IMAGES, PROMPTS)
    assert float(scores["pixels"].max()) < 1e-4


def test_one_bad_image_costs_one_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = score_images(rewards(tmp_path, "picky", "holes"), IMAGES, PROMPTS, batch_size=4)
    for name, value in (("picky", 2.0), ("holes", 2.0)):
        assert np.isnan(scores[name][2])
        assert (np.delete(scores[name], 2) == value).all()
    assert num_failed(scores) == {"picky": 1, "holes": 1}
    assert "cannot look at this" in caplog.text and "1 of 7 images" in caplog.text


def test_dead_scorer_gives_nan_and_the_self_check_refuses_it(tmp_path: Path) -> None:
    scores = score_images(rewards(tmp_path, "broken", "brightness"), IMAGES[:2], PROMPTS[:2])
    assert np.isnan(scores["broken"]).all() and np.isfinite(scores["brightness"]).all()
    with pytest.raises(RewardError, match="'broken': none of 2 images"):
        check_rewards(scores)


def test_constant_reward_is_refused() -> None:
    check_rewards({"fine": np.array([1.0, 1.0, 1.1])})
    check_rewards({"one image cannot tell": np.array([1.0])})
    with pytest.raises(RewardError, match="'flat': all 3 images got 0.5"):
        check_rewards({"fine": np.array([1.0, 2.0]), "flat": np.array([0.5, 0.5, np.nan, 0.5])})


def test_lengths_must_agree(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="7 images but 1 prompts"):
        score_images(rewards(tmp_path, "brightness"), IMAGES, ["a"])


SPOILERS = """
def spoils(images, prompts):
    images *= 255
    return images.mean(dim=(1, 2, 3))
def mean(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


def test_what_a_scorer_does_to_its_images_is_not_seen_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "spoilers.py"
    file.write_text(SPOILERS)
    spoils, mean = (PythonFileReward(name, f"{file}:{name}") for name in ("spoils", "mean"))
    images = torch.full((2, 3, 4, 4), 0.2)
    both = score_images([spoils, mean], images, ["a", "b"])
    assert both["mean"].tolist() == score_images([mean], images, ["a", "b"])["mean"].tolist()
    assert float(images.max()) == pytest.approx(0.2)


def test_an_image_that_is_not_finite_has_no_score_whatever_the_scorer_says(caplog) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[1, 0, 0, 0] = torch.nan
    scores = score_images([JpegCompressibility("jpeg")], images, ["a"] * 3)["jpeg"]
    assert np.isfinite(scores).tolist() == [True, False, True]
    assert "1 of 3 images are not finite numbers: the model that drew them" in caplog.text


def scored(budget: Budget, broken: list[bool]) -> None:
    images = torch.rand(len(broken), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[torch.tensor(broken)] = torch.nan
    score_drawn([JpegCompressibility("jpeg")], Drawn(images=images), ["a"] * len(broken), budget=budget)


def test_single_broken_images_are_left_out_and_many_stop_the_run() -> None:
    budget = Budget("the model")
    scored(budget, [True, True, True, False])  # three are within the budget
    for _ in range(15):
        scored(budget, [False] * 4)
    with pytest.raises(PolicyError, match="16 of the last 64 images of the model are not finite numbers"):
        scored(budget, [True] * 16)
    scored(Budget("the model"), [True] * 3)
    with pytest.raises(PolicyError, match="4 of the last 4 images"):
        scored(Budget("the model"), [True] * 4)


def test_the_share_of_broken_images_is_that_of_the_last_ones() -> None:
    """A model that diverges late is stopped as soon as one that is broken from the start."""
    budget = Budget("the model")
    for _ in range(100):
        scored(budget, [False] * 4)
    scored(budget, [True] * 12)
    with pytest.raises(PolicyError, match="16 of the last 64"):
        scored(budget, [True] * 4)
