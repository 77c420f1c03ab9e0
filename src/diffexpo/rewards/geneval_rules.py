"""GenEval's rules: whether what a detector found in an image is what its prompt asks for. NumPy alone.

The detector's boxes, classes and colours are given. An image is right if every thing that the prompt includes
is found often enough, in its colour and place, and nothing that it excludes is. The six tasks are averaged
with equal weight.

Source: Ghosh et al. (2023), arXiv 2310.11513, and evaluation/evaluate_images.py of their repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffexpo.errors import DataError
from diffexpo.types import Prompt

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence above which a detection counts; in the task `counting` the second one."""
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1
"""Share of both boxes' sizes by which two centres must lie apart before a direction counts."""
_DIRECTION = 0.5


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


def read_check(prompt: Prompt) -> Check:
    """What a prompt of GenEval's list asks for, from the attributes that the list is imported with.

    Raises:
        DataError: the prompt has no such attributes, so it is of another list.
    """
    try:
        clauses = {name: json.loads(prompt.attributes.get(name, "[]")) for name in ("include", "exclude")}
        include, exclude = (tuple(_wanted(clause) for clause in clauses[name]) for name in clauses)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"prompt {prompt.text!r:.60}: its checks cannot be read ({error})") from error
    if not include:
        raise DataError(
            f"prompt {prompt.text!r:.60} does not say what has to be in its image; expected GenEval's list, "
            "imported with `diffexpo data prompts evaluation_metadata.jsonl --format geneval`"
        )
    return Check(prompt.category, include, exclude)


def _wanted(clause: Mapping[str, Any]) -> Wanted:
    relation, target = clause.get("position", ("", 0))
    return Wanted(
        str(clause["class"]), int(clause["count"]), str(clause.get("color", "")), str(relation), int(target)
    )


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
