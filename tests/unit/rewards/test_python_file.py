"""A user's scorer: used as written, blamed clearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffexpo.errors import ConfigError, DiffexpoError, MissingError, RewardError
from diffexpo.rewards.python_file import PythonFileReward

IMAGES = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.5, 0.9)])
PROMPTS = ["a", "bb", "ccc"]
SOURCE = """
import numpy as np
import torch
from dataclasses import dataclass

@dataclass
class Odd(Exception):
    text: str = "odd one"

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
def lengths(images, prompts):
    return [len(prompt) for prompt in prompts]
def array(images, prompts):
    return np.array([1.0, 2.0, 3.0])
def holes(images, prompts):
    return [1.0, float("nan"), float("inf")]
def short(images, prompts):
    return [1.0]
def matrix(images, prompts):
    return torch.ones(3, 3)
def words(images, prompts):
    return prompts
def nothing(images, prompts):
    pass
def crash(images, prompts):
    return [1 / 0 for _ in prompts]
def odd(images, prompts):
    raise Odd()
def stop(images, prompts):
    raise KeyboardInterrupt
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("function", "expected"), [("brightness", [0.1, 0.5, 0.9]), ("lengths", [1, 2, 3]), ("array", [1, 2, 3])]
)
def test_numbers_of_any_kind_are_scores(file: Path, function: str, expected: list[float]) -> None:
    scores = PythonFileReward("mine", f"{file}:{function}").score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))


def test_non_finite_is_nan(file: Path) -> None:
    scores = PythonFileReward("mine", f"{file}:holes").score(IMAGES, PROMPTS)
    assert scores[0] == 1 and bool(torch.isnan(scores[1:]).all())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"mine.py:short returned shape \(1,\) for 3 images"),
        ("matrix", r"returned shape \(3, 3\) for 3 images"),
        ("words", "returned list, which is not numbers"),
        ("nothing", "returned NoneType, which is not numbers"),
        ("crash", r"raised ZeroDivisionError: division by zero \(line \d+ of mine.py\)"),
        ("odd", "raised Odd"),
    ],
)
def test_bad_results_are_explained(file: Path, function: str, message: str) -> None:
    reward = PythonFileReward("mine", f"{file}:{function}")
    with pytest.raises(RewardError, match=message):
        reward.score(IMAGES, PROMPTS)


def test_interruption_passes_through(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        PythonFileReward("mine", f"{file}:stop").score(IMAGES, PROMPTS)


def refuse(path: str, kind: type[DiffexpoError], match: str) -> None:
    with pytest.raises(kind, match=match):
        PythonFileReward("mine", path)


def test_wrong_paths_are_explained(file: Path, tmp_path: Path) -> None:
    refuse(str(file), ConfigError, "expected `file.py:function`")
    refuse(f"{file}:not a name", ConfigError, "expected `file.py:function`")
    refuse(f"{tmp_path / 'absent.py'}:f", MissingError, "no file .*absent.py")
    refuse(f"{file}:brightnes", MissingError, "no function 'brightnes'; it defines .*brightness")
    refuse(f"{file}:number", MissingError, "no function 'number'")


def test_file_that_does_not_run_is_explained(tmp_path: Path) -> None:
    for text, error in (
        ("x = 1\ndef f(:\n", r"SyntaxError: .*\(bad.py, line 2\); correct"),
        ("x = 1\nimport no_such_module_here\n", r"ModuleNotFoundError: .*\(line 2 of bad.py\); correct"),
    ):
        (tmp_path / "bad.py").write_text(text)
        refuse(f"{tmp_path / 'bad.py'}:f", RewardError, f"importing .*bad.py raised {error}")


def test_version_follows_the_source(file: Path) -> None:
    before = PythonFileReward("mine", f"{file}:array").version
    file.write_text(SOURCE + "\n# changed")
    assert PythonFileReward("mine", f"{file}:array").version != before


@pytest.mark.parametrize("concurrency", [2, 3, 8])
def test_several_calls_at_once_give_the_same_scores(tmp_path: Path, concurrency: int) -> None:
    source = (
        "import threading\nmeeting = threading.Barrier({})\ndef f(images, prompts):\n    meeting.wait(10)\n"
    )
    source += "    return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts)]\n"
    # The calls wait for each other: were they one after the other, the barrier would break.
    (tmp_path / "meet.py").write_text(source.format(min(concurrency, len(PROMPTS))))
    scores = PythonFileReward("mine", f"{tmp_path / 'meet.py'}:f", concurrency=concurrency).score(
        IMAGES, PROMPTS
    )
    torch.testing.assert_close(scores, torch.tensor([1.1, 2.5, 3.9]))


def test_no_images_have_no_scores(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def f(images, prompts):\n    return [1.0] * len(images)\n")
    for concurrency in (1, 4):
        reward = PythonFileReward("mine", f"{tmp_path / 'none.py'}:f", concurrency=concurrency)
        assert reward.score(IMAGES[:0], []).shape == (0,)
