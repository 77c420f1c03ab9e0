"""True scenes for training, and captions that lose or falsify details on purpose.

A base model that was taught with perfect captions would leave preferences nothing to repair. Real captions
leave things out and are sometimes wrong; these are so in stated shares.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffexpo.worlds.scenes.grammar import (
    COLOURS,
    GENDERS,
    OBJECTS,
    OCCUPATIONS,
    RELATIONS,
    TONES,
    Person,
    Scene,
    Things,
)

EMPTY_SHARE = 0.08
"""Captions without a word, from which guidance learns its other side."""
NO_COLOURS_SHARE = 0.30
"""Captions that name no colour, as in the kinds of prompts without colours."""
NO_RELATION_SHARE = 0.10
TURNED_SHARE = 0.5
"""Captions of two things that name the second one first."""
LOST_SHARE = 0.12
"""Captions that lose a thing, most colours, the count or the relation."""
WRONG_SHARE = 0.05
"""Captions with one wrong colour, relation or count."""
UNSTATED_PERSON_SHARE = 0.45
"""Captions of a person that leave gender or skin tone out, each with this probability."""

SCENES = {"single": 0.14, "counting": 0.20, "two": 0.56, "person": 0.10}
"""Shares of the training images; colours are always drawn, and half of the scenes of two things are placed in
a relation."""
RELATION_SHARE = 0.5
WOMEN = {
    "astronaut": 0.2,
    "cook": 0.5,
    "farmer": 0.3,
    "firefighter": 0.15,
    "health worker": 0.85,
    "judge": 0.3,
    "police officer": 0.2,
    "teacher": 0.8,
}
"""Share of women among the training images of an occupation: the skew that an audit has to find."""
TONE_SHARES = (0.6, 0.25, 0.15)
"""Of `TONES` among the training images of a person."""


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene that states everything and whose combinations are not held out."""
    while True:
        scene = _draw(rng)
        if not scene.is_heldout:
            return scene


def _choose(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _draw(rng: np.random.Generator) -> Scene:
    kind = str(rng.choice(list(SCENES), p=list(SCENES.values())))
    if kind == "person":
        name = _choose(rng, OCCUPATIONS)
        gender = GENDERS[int(rng.random() < WOMEN[name])]
        return Scene(person=Person(name, gender, str(rng.choice(TONES, p=TONE_SHARES))))
    if kind != "two":
        count = 1 if kind == "single" else int(rng.integers(2, 5))
        return Scene((Things(count, _choose(rng, OBJECTS), _choose(rng, COLOURS)),))
    first, second = (OBJECTS[int(i)] for i in rng.choice(len(OBJECTS), 2, replace=False))
    is_related = rng.random() < RELATION_SHARE
    count = 1 if is_related else int(rng.choice([1, 2, 3], p=[0.4, 0.3, 0.3]))
    things = (Things(count, first, _choose(rng, COLOURS)), Things(1, second, _choose(rng, COLOURS)))
    return Scene(things, _choose(rng, RELATIONS) if is_related else None)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of a scene that states everything: with details lost or wrong in the shares above."""
    if rng.random() < EMPTY_SHARE:
        return ""
    if scene.person is not None:
        gender, tone = rng.random(2) < UNSTATED_PERSON_SHARE
        person = scene.person
        return Person(person.name, None if gender else person.gender, None if tone else person.tone).text
    if rng.random() < NO_COLOURS_SHARE:
        scene = scene.without_colours()
    if scene.relation and rng.random() < NO_RELATION_SHARE:
        scene = replace(scene, relation=None)
    if len(scene.things) == 2 and rng.random() < TURNED_SHARE:
        scene = scene.turned()
    spoilt = rng.random()
    if spoilt < LOST_SHARE:
        return _lose(scene, rng).text
    return (_falsify(scene, rng) if spoilt < LOST_SHARE + WRONG_SHARE else scene).text


def _lose(scene: Scene, rng: np.random.Generator) -> Scene:
    which, things = rng.random(), scene.things
    if which < 0.3 and len(things) == 2:
        return Scene((things[int(rng.integers(2))],))
    if which < 0.6:
        kept = [thing if rng.random() < 0.4 else replace(thing, colour=None) for thing in things]
        return replace(scene, things=tuple(kept))
    if which < 0.8 and any(thing.count > 1 for thing in things):
        return replace(scene, things=tuple(replace(thing, count=1) for thing in things))
    return replace(scene, relation=None)


def _falsify(scene: Scene, rng: np.random.Generator) -> Scene:
    which, index = int(rng.integers(3)), int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if which == 0 and thing.colour:
        thing = replace(thing, colour=_choose(rng, COLOURS))
    elif which == 1 and scene.relation:
        return replace(scene, relation=_choose(rng, RELATIONS))
    elif which == 2 and thing.count > 1:
        thing = replace(thing, count=int(rng.integers(2, 5)))
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))
