"""GenEval's rules: whether what a detector found in an image is what its prompt asks for. NumPy alone.

The detector's boxes, classes and colours are given, and the prompt's text says what it asks for. An image is
right if every thing that the prompt includes is found often enough, in its colour and place, and nothing that
it excludes is. The six tasks are averaged with equal weight.

Source: Ghosh et al. (2023), arXiv 2310.11513, and evaluation/evaluate_images.py of their repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffexpo.errors import RewardError

_LISTED = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
NAMES = tuple(_LISTED.split(","))
"""The classes of COCO in their order, as GenEval calls them."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence above which a detection counts; in the task `counting` the second one."""
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1
"""Share of both boxes' sizes by which two centres must lie apart before a direction counts."""
_DIRECTION = 0.5
_BY_PLURAL = {f"{name}es" if name.endswith("s") else f"{name}s": name for name in NAMES}


def _any(words: Sequence[str]) -> str:
    return "|".join(map(re.escape, words))


_NAME, _COLOUR = (f"an? (?P<{{0}}>{_any(words)})" for words in (NAMES, COLOURS))
_COLOURED = f"{_COLOUR} (?P<{{1}}>{_any(NAMES)})"
_PATTERNS = {
    task: re.compile(f"a photo of {pattern}")
    for task, pattern in {
        "single_object": _NAME.format("name"),
        "two_object": f"{_NAME.format('name')} and {_NAME.format('name_2')}",
        "counting": f"(?P<number>{_any(NUMBERS[2:])}) (?P<name>{_any(tuple(_BY_PLURAL))})",
        "colors": _COLOURED.format("colour", "name"),
        "position": f"{_NAME.format('name')} (?P<relation>{_any(RELATIONS)}) {_NAME.format('name_2')}",
        "color_attr": f"{_COLOURED.format('colour', 'name')} and {_COLOURED.format('colour_2', 'name_2')}",
    }.items()
}


@dataclass(frozen=True)
class Detection:
    """Something found: its class, confidence in [0, 1], box (x0, y0, x1, y1) in pixels, and colour, where it
    was looked at."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    colour: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks of a class: `count` of it, all of a `colour`, `relation` to those found for an
    earlier clause (`target`)."""

    name: str
    count: int
    colour: str = ""
    relation: str = ""
    target: int = 0


@dataclass(frozen=True)
class Check:
    """What a prompt asks for: its task, what has to be there, and what must not be there so often."""

    task: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


def read_check(text: str) -> Check:
    """What a prompt of GenEval asks for: all of its prompts are made from six patterns.

    Args:
        text: "a photo of two cups", "a photo of a red car", "a photo of a dog left of a tv", ...
    Returns:
        Its task and clauses, as the published metadata has them.
    Raises:
        RewardError: the text follows none of the patterns, so it is of another list.
    """
    for task, pattern in _PATTERNS.items():
        found = pattern.fullmatch(text.strip())
        if found is not None:
            return _check(task, **found.groupdict())
    raise RewardError(
        f"the prompt {text!r:.60} is none of GenEval's; expected one such as 'a photo of two cups' or "
        "'a photo of a red car left of a dog'"
    )


def _check(task: str, **found: str) -> Check:
    names = [_BY_PLURAL.get(name, name) for key, name in found.items() if key.startswith("name")]
    if task == "counting":
        count = NUMBERS.index(found["number"])
        return Check(task, (Wanted(names[0], count),), (Wanted(names[0], count + 1),))
    if task == "position":
        # The published metadata has the thing that is referred to first.
        return Check(task, (Wanted(names[1], 1), Wanted(names[0], 1, relation=found["relation"])))
    colours = [colour for key, colour in found.items() if key.startswith("colour")] or [""] * len(names)
    return Check(task, tuple(Wanted(name, 1, colour) for name, colour in zip(names, colours, strict=True)))


def kept(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first and at most 16 of each."""
    least = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.confidence):
        if one.confidence > least:
            found.setdefault(one.name, []).append(one)
    return {name: those[:MAX_OBJECTS] for name, those in found.items()}


def is_right(detections: Sequence[Detection], check: Check) -> bool:
    """Whether an image is right.

    Colour and place are looked at for the surest detections of a class only, as many as the clause asks for;
    a place is that of every one of them to every one of the clause it refers to.

    Args:
        detections: All of the image.
        check: What its prompt asks for.
    Returns:
        A car at 0.95 and the check "one car" are right; the same with "two cars" is wrong.
    """
    found = kept(detections, check.task)
    matched: list[list[Detection]] = []
    for clause in check.include:
        surest = found.get(clause.name, [])[: clause.count]
        if len(surest) < clause.count:
            return False
        if clause.colour and any(one.colour != clause.colour for one in surest):
            return False
        if clause.relation and not all(
            clause.relation in relations(one.box, other.box)
            for one in surest
            for other in matched[clause.target]
        ):
            return False
        matched.append(surest)
    return not any(len(found.get(clause.name, [])) >= clause.count for clause in check.exclude)


def relations(first: Sequence[float], second: Sequence[float]) -> set[str]:
    """Where the first of two boxes (x0, y0, x1, y1) lies as seen from the second.

        offset' = sign(o) max(|o| - 0.1 (size_1 + size_2), 0),  o = centre_1 - centre_2
        a direction counts if its part of offset' / |o| is above 1/2

    Returns:
        Of "left of", "right of", "above" and "below" none, one or two neighbours: boxes that nearly cover
        each other have none, and a box up to the left has two.
    """
    boxes = np.array([first, second], dtype=np.float64).reshape(2, 2, 2)
    offset = boxes[0].mean(axis=0) - boxes[1].mean(axis=0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    across, down = beyond / np.linalg.norm(offset)
    named = {
        "left of": across < -_DIRECTION,
        "right of": across > _DIRECTION,
        "above": down < -_DIRECTION,
        "below": down > _DIRECTION,
    }
    return {name for name, holds in named.items() if holds}
