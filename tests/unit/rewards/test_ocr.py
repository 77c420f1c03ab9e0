"""Text asked for against text read; the recogniser itself is a third party's and stands in as a module."""

from __future__ import annotations

import random
import sys
from functools import cache
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.ocr import OcrReward, edit_distance, quoted_text, text_match


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "Open Late", neon', "Open Late"),
        ('"first" and "second"', "first"),
        ("a sign that says \u201cOuvert\u201d", "Ouvert"),
        ("a dog's bone", None),
        ('one " alone', None),
        ('empty "" quotes', None),
        ("", None),
    ],
)
def test_the_first_quoted_text_is_asked_for(prompt: str, expected: str | None) -> None:
    assert quoted_text(prompt) == expected


def test_edit_distance_against_its_recursion() -> None:
    def plain(first: str, second: str) -> int:
        @cache
        def distance(i: int, j: int) -> int:
            if i == 0 or j == 0:
                return i + j
            change = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
            return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, change)

        return distance(len(first), len(second))

    draw = random.Random(0)
    for _ in range(60):
        first, second = ("".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(2))
        assert edit_distance(first, second) == plain(first, second) == edit_distance(second, first)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("target", "read", "expected"),
    [
        ("hello world", "HELLOWORLD 24", 1.0),
        ("open", "oven", 0.75),
        ("open", "", 0.0),
        ("open", "something else entirely", 0.0),
        ("ab", "xxabyy", 1.0),
        ("Stra\u00dfe", "STRASSE", 1.0),
    ],
)
def test_match(target: str, read: str, expected: float) -> None:
    assert text_match(target, read) == pytest.approx(expected)


def test_nothing_to_read_for_is_refused() -> None:
    with pytest.raises(RewardError, match="expected at least one character"):
        text_match("  ", "x")


@pytest.fixture
def recogniser(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """A rapidocr whose texts depend on the image's top left pixel; the images it saw."""
    seen: list[Image.Image] = []
    texts = {0: ("Open", "late"), 1: None, 2: (), 3: ("oven",)}

    class RapidOCR:
        def __call__(self, image: Image.Image) -> SimpleNamespace:
            seen.append(image)
            number = image.getpixel((0, 0))[0]
            if number == 9:
                raise LookupError("engine trouble")
            return SimpleNamespace(txts=texts[number])

    module = ModuleType("rapidocr")
    module.RapidOCR = RapidOCR
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    return seen


def images(*levels: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 5), level / 255) for level in levels])


def test_scores_of_images(recogniser: list[Image.Image]) -> None:
    prompts = ['"OPEN LATE"', '"open"', '"open"', '"open"', "no text"]
    scores = OcrReward("ocr").score(images(0, 1, 2, 3, 0), prompts)
    np.testing.assert_allclose(scores.numpy(), [1.0, 0.0, 0.0, 0.75, np.nan])
    # A PIL image says that its channels are RGB; arrays are taken for BGR. Nothing is read for a prompt without text.
    assert [image.mode for image in recogniser] == ["RGB"] * 4 and recogniser[0].size == (5, 4)


def test_trouble_in_the_recogniser_is_a_reward_error(recogniser: list[Image.Image]) -> None:
    scorer = OcrReward("ocr")
    with pytest.raises(RewardError, match="'ocr': rapidocr raised LookupError: engine trouble"):
        scorer.score(images(9), ['"open"'])
    with pytest.raises(RewardError, match="1 images but 2 prompts"):
        scorer.score(images(0), ["a", "b"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingError, match=r'pip install "diffexpo\[ocr\]"'):
        OcrReward("ocr")
