"""Training scenes and their captions: what is spoilt, and how often."""

from __future__ import annotations

from collections import Counter

import numpy as np

from diffexpo.worlds.scenes.grammar import parse_scene
from worlds.scenes.captions import EMPTY_SHARE, WOMEN, caption, draw_scene

NUM = 4000


def _drawn() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(NUM)]
    return [(scene.text, caption(scene, rng)) for scene in scenes]


DRAWN = _drawn()


def test_no_training_scene_holds_an_unseen_combination() -> None:
    assert not any(parse_scene(text).is_heldout for text, _ in DRAWN)


def test_every_caption_is_of_the_grammar_or_empty() -> None:
    empty = 0
    for _, text in DRAWN:
        if text:
            parse_scene(text)
        empty += not text
    # Three standard errors of a share.
    assert abs(empty / NUM - EMPTY_SHARE) < 3 * (EMPTY_SHARE / NUM) ** 0.5


def test_some_captions_are_wrong_and_most_are_true() -> None:
    wrong = true = 0
    for stated, text in DRAWN:
        scene = parse_scene(stated)
        if not text or scene.person is not None:
            continue
        said = parse_scene(text)
        colours = {thing.name: thing.colour for thing in scene.things}
        is_wrong = any(thing.colour not in (None, colours[thing.name]) for thing in said.things)
        facts = (scene.relation, scene.turned().relation)
        is_wrong |= said.relation not in (None, *facts)
        wrong += is_wrong
        true += not is_wrong
    assert 0.005 < wrong / (wrong + true) < 0.05


def test_people_are_drawn_with_the_stated_skew() -> None:
    rng = np.random.default_rng(1)
    people = [scene.person for scene in (draw_scene(rng) for _ in range(20_000)) if scene.person is not None]
    women = Counter(person.name for person in people if person.gender == "woman")
    total = Counter(person.name for person in people)
    order = sorted(WOMEN, key=lambda name: WOMEN[name])
    shares = [women[name] / total[name] for name in (order[0], order[-1])]
    assert shares[0] < 0.35 and shares[1] > 0.65
