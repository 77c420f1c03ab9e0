"""GenEval's published evaluation rules on made detections: each case a rule."""

import pytest

from diffexpo.errors import RewardError
from diffexpo.rewards.geneval_rules import (
    NAMES,
    Check,
    Detection,
    Wanted,
    is_right,
    kept,
    read_check,
    relations,
)


def seen(name, confidence=0.95, x=0.0, y=0.0, colour="", side=10.0):
    return Detection(name, confidence, (x, y, x + side, y + side), colour)


def one(task, *include, exclude=()):
    return Check(task, include, exclude)


CAR = Wanted("car", 1)


@pytest.mark.parametrize(
    ("found", "check", "is_it"),
    [
        # What is not found, found twice, found among others.
        ([], one("single_object", CAR), False),
        ([seen("car")], one("single_object", CAR), True),
        ([seen("car"), seen("car"), seen("dog")], one("single_object", CAR), True),
        # The threshold is 0.3, and only above it.
        ([seen("car", 0.31)], one("single_object", CAR), True),
        ([seen("car", 0.30)], one("single_object", CAR), False),
        # Two things.
        ([seen("car")], one("two_object", CAR, Wanted("dog", 1)), False),
        ([seen("dog"), seen("car")], one("two_object", CAR, Wanted("dog", 1)), True),
        # Counting: exactly, and above 0.9 only.
        ([seen("car")] * 2, one("counting", Wanted("car", 2), exclude=(Wanted("car", 3),)), True),
        ([seen("car")], one("counting", Wanted("car", 2), exclude=(Wanted("car", 3),)), False),
        ([seen("car")] * 3, one("counting", Wanted("car", 2), exclude=(Wanted("car", 3),)), False),
        (
            [seen("car"), seen("car"), seen("car", 0.9)],
            one("counting", Wanted("car", 2), exclude=(Wanted("car", 3),)),
            True,
        ),
        # Colour: of the surest one.
        ([seen("car", colour="red")], one("colors", Wanted("car", 1, "red")), True),
        ([seen("car", colour="blue")], one("colors", Wanted("car", 1, "red")), False),
        (
            [seen("car", 0.9, colour="blue"), seen("car", 0.8, colour="red")],
            one("colors", Wanted("car", 1, "red")),
            False,
        ),
        # Attribution.
        (
            [seen("car", colour="red"), seen("dog", colour="blue")],
            one("color_attr", Wanted("car", 1, "red"), Wanted("dog", 1, "blue")),
            True,
        ),
        (
            [seen("car", colour="blue"), seen("dog", colour="red")],
            one("color_attr", Wanted("car", 1, "red"), Wanted("dog", 1, "blue")),
            False,
        ),
        # Position: of the second clause as seen from the first.
        ([seen("car"), seen("dog", x=40)], one("position", CAR, Wanted("dog", 1, "", "right of", 0)), True),
        ([seen("car"), seen("dog", x=-40)], one("position", CAR, Wanted("dog", 1, "", "right of", 0)), False),
        ([seen("dog", x=40)], one("position", CAR, Wanted("dog", 1, "", "right of", 0)), False),
        # Only the surest of the clause's count decides.
        (
            [seen("car"), seen("dog", 0.9, x=40), seen("dog", 0.5, x=-40)],
            one("position", CAR, Wanted("dog", 1, "", "right of", 0)),
            True,
        ),
    ],
)
def test_a_rule(found, check, is_it):
    assert is_right(found, check) is is_it


def test_at_most_sixteen_of_a_class_count():
    assert len(kept([seen("car", 0.4 + number / 100) for number in range(20)], "colors")["car"]) == 16
    assert kept([seen("car", 0.4), seen("car", 0.8)], "colors")["car"][0].confidence == 0.8


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        # Each centre has to be beyond a tenth of both sizes: here 2 of 10 + 10 pixels.
        (2, 0, set()),
        (3.9, 0, set()),
        (4.1, 0, {"right of"}),
        (0, 0, set()),
    ],
)
def test_directions_with_the_published_margin(x, y, expected):
    assert relations((x, y, x + 10, y + 10), (0, 0, 10, 10)) == expected


CASES = [
    ("single_object", "a bench", [{"class": "bench", "count": 1}], []),
    ("single_object", "an orange", [{"class": "orange", "count": 1}], []),
    (
        "two_object",
        "a couch and a wine glass",
        [{"class": "couch", "count": 1}, {"class": "wine glass", "count": 1}],
        [],
    ),
    ("counting", "two toilets", [{"class": "toilet", "count": 2}], [{"class": "toilet", "count": 3}]),
    (
        "counting",
        "four wine glasses",
        [{"class": "wine glass", "count": 4}],
        [{"class": "wine glass", "count": 5}],
    ),
    ("colors", "an orange cow", [{"class": "cow", "count": 1, "color": "orange"}], []),
    (
        "position",
        "a laptop right of a tv",
        [{"class": "tv", "count": 1}, {"class": "laptop", "count": 1, "position": ["right of", 0]}],
        [],
    ),
    (
        "color_attr",
        "a black bus and a brown tv remote",
        [
            {"class": "bus", "count": 1, "color": "black"},
            {"class": "tv remote", "count": 1, "color": "brown"},
        ],
        [],
    ),
]


def wanted(clauses):
    return tuple(
        Wanted(one["class"], one["count"], one.get("color", ""), *one.get("position", ("", 0)))
        for one in clauses
    )


@pytest.mark.parametrize(("task", "text", "include", "exclude"), CASES)
def test_a_text_asks_for_what_its_published_metadata_says(task, text, include, exclude):
    assert read_check(f"a photo of {text}") == Check(task, wanted(include), wanted(exclude))


@pytest.mark.parametrize(
    "text", ["a cat", "a photo of a cat on a mat", "a photo of two cat", "a photo of a mauve car"]
)
def test_another_prompt_is_refused(text):
    with pytest.raises(RewardError, match="none of GenEval's"):
        read_check(text)


def test_there_are_80_classes():
    assert len(set(NAMES)) == len(NAMES) == 80
