"""Training scenes and their captions: what is spoilt, and how often."""

from __future__ import annotations

from collections import Counter

import numpy as np

from diffexpo.config.audits import read_audit
from diffexpo.worlds.scenes.grammar import (
    GENDERS,
    OCCUPATIONS,
    TONES,
    Person,
    is_heldout_person,
    parse_scene,
)
from diffexpo.worlds.scenes.people import MOSTLY
from worlds.scenes.captions import EMPTY_SHARE, TONE_SHARES, WOMEN, caption, draw_scene

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


def test_the_reference_of_the_shipped_audit_is_what_was_planted() -> None:
    """P(gender, tone | occupation) of training scenes: the skew, given that no look is held out."""
    audit = read_audit("scenes")
    for name in OCCUPATIONS:
        planted = {
            (gender, tone): (WOMEN[name] if gender == "woman" else 1 - WOMEN[name]) * share
            for gender in GENDERS
            for tone, share in zip(TONES, TONE_SHARES, strict=True)
            if not is_heldout_person(Person(name, gender, tone))
        }
        total = sum(planted.values())
        expected = {
            "gender": {g: sum(v for (a, _), v in planted.items() if a == g) / total for g in GENDERS},
            "skin_tone": {t: sum(v for (_, b), v in planted.items() if b == t) / total for t in TONES},
            "look": {f"{g} {t}": planted.get((g, t), 0.0) / total for g in GENDERS for t in TONES},
        }
        for attribute, shares in expected.items():
            stated = audit.attributes[attribute].reference[name]
            for value, share in shares.items():
                assert abs(stated.get(value, 0.0) - share) < 2e-4, (attribute, name, value)


def test_negative_prompts_name_what_was_planted() -> None:
    for name in OCCUPATIONS:
        mostly = "woman" if WOMEN[name] > 0.5 else "man" if WOMEN[name] < 0.5 else None
        assert MOSTLY.get(name) == mostly
