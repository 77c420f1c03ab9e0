"""The prompts of the scenes: what they say, how they are read, and what is held out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from diffexpo.worlds.scenes.grammar import (
    COLOURS,
    HELDOUT_SHARE,
    KINDS,
    LENGTHS,
    OBJECTS,
    OPPOSITE,
    Person,
    Scene,
    Things,
    all_scenes,
    parse_scene,
    prompts_of,
    scenes_of,
)

SPLITS = ("train", "validation", "new", "unseen")


def test_every_text_is_read_as_the_scene_that_it_came_from() -> None:
    texts = {scene.text for scene in all_scenes()}
    assert len(texts) == len(all_scenes()) == 48_642
    assert all(parse_scene(scene.text) == scene for scene in all_scenes())


@pytest.mark.parametrize(
    ("scene", "text", "kind"),
    [
        (Scene((Things(1, "umbrella"),)), "an umbrella", "single"),
        (Scene((Things(1, "hat", "orange"),)), "an orange hat", "color"),
        (Scene((Things(3, "key", "red"),)), "three red keys", "counting"),
        (Scene((Things(2, "fish"), Things(1, "apple"))), "two fish and an apple", "two"),
        (Scene((Things(1, "bell"), Things(1, "hat")), "left of"), "a bell left of a hat", "position"),
        (
            Scene((Things(1, "bell", "blue"), Things(1, "hat", "orange")), "above"),
            "a blue bell above an orange hat",
            "bound",
        ),
        (
            Scene((Things(1, "bell", "blue"), Things(1, "hat", "red"))),
            "a blue bell and a red hat",
            "attribution",
        ),
        (Scene(person=Person("judge", "woman", "dark")), "a woman judge with dark skin", "person"),
        (Scene(person=Person("astronaut")), "an astronaut", "person"),
    ],
)
def test_a_scene_is_worded_and_named(scene: Scene, text: str, kind: str) -> None:
    assert (scene.text, scene.kind, parse_scene(text)) == (text, kind, scene)


@pytest.mark.parametrize(
    "text", ["", "a pink key", "five keys", "a key beside a hat", "a photo of a red key"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no prompt of a scene"):
        parse_scene(text)


def test_turning_a_scene_twice_gives_it_back_and_says_the_same() -> None:
    scene = parse_scene("a blue bell left of an orange hat")
    assert scene.turned().text == "an orange hat right of a blue bell"
    assert scene.turned().turned() == scene
    assert all(OPPOSITE[OPPOSITE[relation]] == relation for relation in OPPOSITE)


def test_what_is_held_out_is_a_combination_and_about_its_share() -> None:
    seen = [scene for scene in all_scenes() if not scene.is_heldout]
    assert {thing.name for scene in seen for thing in scene.things} == set(OBJECTS)
    assert {thing.colour for scene in seen for thing in scene.things} == {None, *COLOURS}
    pairs = [Scene((Things(1, a), Things(1, b))) for a in OBJECTS for b in OBJECTS if a < b]
    share = np.mean([scene.is_heldout for scene in pairs])
    # 153 keyed draws at 12%: a standard error of 2.6 points.
    assert abs(share - HELDOUT_SHARE) < 3 * 0.026
    # Stating less never makes a seen combination an unseen one.
    assert not any(scene.without_colours().is_heldout for scene in seen if scene.things)


def test_lists_of_prompts_share_no_text_and_keep_what_is_held_out() -> None:
    lists = {split: scenes_of(split) for split in SPLITS}
    texts = [scene.text for scenes in lists.values() for scene in scenes]
    assert len(texts) == len(set(texts)) == sum(LENGTHS.values())
    assert {split: len(scenes) for split, scenes in lists.items()} == LENGTHS
    assert all(scene.is_heldout for scene in lists["unseen"])
    assert not any(scene.is_heldout for split in SPLITS[:3] for scene in lists[split])
    with pytest.raises(KeyError, match="expected train, validation"):
        scenes_of("test")


def test_every_beginning_has_the_shares_of_the_kinds() -> None:
    first = Counter(scene.kind for scene in scenes_of("train")[:100])
    assert all(abs(first[kind] - 100 * share) <= 1 for kind, share in KINDS.items())


def test_held_out_prompts_alternate_between_new_and_unseen() -> None:
    prompts = prompts_of(scenes_of("heldout")[:300])
    kinds = [prompt.attributes["combination"] for prompt in prompts]
    assert all(first != second for first, second in pairwise(kinds))
    assert {prompt.category for prompt in prompts} == set(KINDS)
