"""The prompts of the scenes: what they say, which combinations no base model sees, and how a text is read.

There are eight kinds. The first six are those of GenEval (arXiv 2310.11513, section 3.1); `bound` states
colours and a position at once, and `person` asks for one person at work.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

from diffexpo.types import Prompt
from diffexpo.worlds.keyed import keyed_fraction

OBJECTS = (
    "car", "tree", "fish", "star", "heart", "cat", "dog", "apple", "house",
    "umbrella", "bird", "book", "boat", "key", "mushroom", "bell", "crown", "hat",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
OCCUPATIONS = (
    "astronaut", "cook", "farmer", "firefighter", "health worker", "judge", "police officer", "teacher",
)  # fmt: skip
GENDERS = ("man", "woman")
TONES = ("light", "medium", "dark")

HELDOUT_SHARE = 0.12
"""Of the colours of an object, of the pairs of objects, of the counts of an object, and of the looks of a
person: those that no base model saw."""

KINDS = {
    "single": 0.05,
    "color": 0.11,
    "counting": 0.20,
    "two": 0.14,
    "position": 0.16,
    "attribution": 0.16,
    "bound": 0.10,
    "person": 0.08,
}
"""Every kind of prompt with its share of a list of prompts."""


@dataclass(frozen=True)
class Things:
    """Equal things of a scene: `count` (1 to 4) of one of `OBJECTS`; colour None: any."""

    count: int
    name: str
    colour: str | None = None

    @property
    def text(self) -> str:
        """The words, such as "three red keys"."""
        words = [self.colour] if self.colour else []
        words.append(self.name if self.count == 1 or self.name == "fish" else f"{self.name}s")
        if self.count > 1:
            return " ".join([NUMBERS[self.count], *words])
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@dataclass(frozen=True)
class Person:
    """One person at work: one of `OCCUPATIONS`; gender or skin tone None: any."""

    name: str
    gender: str | None = None
    tone: str | None = None

    @property
    def text(self) -> str:
        """The words, such as "a woman judge with dark skin"."""
        words = " ".join([self.gender, self.name] if self.gender else [self.name])
        article = "an" if words[0] in "aeiou" else "a"
        return f"{article} {words} with {self.tone} skin" if self.tone else f"{article} {words}"


@dataclass(frozen=True)
class Scene:
    """What an image has to show, and nothing else.

    Args:
        things: one or two kinds of things with different names; empty where `person` is given.
        relation: where the first thing lies, seen from the second; one of `RELATIONS` or None.
        person: the one person of the scene.
    """

    things: tuple[Things, ...] = ()
    relation: str | None = None
    person: Person | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        if self.person is not None:
            return self.person.text
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(thing.text for thing in self.things)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.person is not None:
            return "person"
        has_colour = any(thing.colour for thing in self.things)
        if len(self.things) == 1:
            if self.things[0].count > 1:
                return "counting"
            return "color" if has_colour else "single"
        if self.relation:
            return "bound" if has_colour else "position"
        return "attribution" if has_colour else "two"

    @property
    def is_heldout(self) -> bool:
        """Whether it states a combination that no base model saw."""
        if self.person is not None:
            return is_heldout_person(self.person)
        names = sorted(thing.name for thing in self.things)
        return (
            any(is_heldout_colour(thing.name, thing.colour) for thing in self.things if thing.colour)
            or (len(names) == 2 and _is_kept_back("pair", *names))
            or any(
                thing.count > 1 and _is_kept_back("count", thing.count, thing.name) for thing in self.things
            )
        )

    def without_colours(self) -> Scene:
        """The same scene with colours left open."""
        return replace(self, things=tuple(replace(thing, colour=None) for thing in self.things))

    def turned(self) -> Scene:
        """The same scene, told from the other side: two things in the other order."""
        return replace(self, things=self.things[::-1], relation=OPPOSITE.get(self.relation or ""))


@cache
def _is_kept_back(*names: object) -> bool:
    return keyed_fraction(*names) < HELDOUT_SHARE


def is_heldout_colour(name: str, colour: str) -> bool:
    """Whether no base model saw this object in this colour."""
    return _is_kept_back("oc", name, colour)


def is_heldout_person(person: Person) -> bool:
    """Whether no base model saw this look; every look that the words allow must be kept back."""
    looks = itertools.product(
        [person.gender] if person.gender else GENDERS, [person.tone] if person.tone else TONES
    )
    return all(_is_kept_back("person", person.name, gender, tone) for gender, tone in looks)


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene that has a prompt, 48,642 with different texts, in a fixed order."""
    return tuple(itertools.chain(_alone(), _together(), _people()))


def _alone() -> Iterator[Scene]:
    for count, name, colour in itertools.product((1, *NUMBERS), OBJECTS, (None, *COLOURS)):
        yield Scene((Things(count, name, colour),))


def _together() -> Iterator[Scene]:
    one = {(name, colour): Things(1, name, colour) for name in OBJECTS for colour in (None, *COLOURS)}
    for a, b in itertools.permutations(OBJECTS, 2):
        for count in (1, 2, 3):
            yield Scene((Things(count, a), one[b, None]))
        for relation in RELATIONS:
            yield Scene((one[a, None], one[b, None]), relation)
        for c, d in itertools.permutations(COLOURS, 2):
            for stated in (None, *RELATIONS):
                yield Scene((one[a, c], one[b, d]), stated)


def _people() -> Iterator[Scene]:
    for name, gender, tone in itertools.product(OCCUPATIONS, (None, *GENDERS), (None, *TONES)):
        yield Scene(person=Person(name, gender, tone))


_ONE = rf"(?:an?|{'|'.join(NUMBERS.values())}) (?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(OBJECTS)})s?"
_SCENE = re.compile(rf"({_ONE})(?: (and|{'|'.join(RELATIONS)}) ({_ONE}))?")
_PERSON = re.compile(
    rf"an? (?:({'|'.join(GENDERS)}) )?({'|'.join(OCCUPATIONS)})(?: with ({'|'.join(TONES)}) skin)?"
)


def _things_of(text: str) -> Things:
    number, *colour, noun = text.split()
    counts = {word: count for count, word in NUMBERS.items()}
    name = noun if noun in OBJECTS else noun.removesuffix("s")
    return Things(counts.get(number, 1), name, colour[0] if colour else None)


def parse_scene(text: str) -> Scene:
    """The scene that a prompt asks for; the exact inverse of `Scene.text`.

    Raises:
        ValueError: the text is no prompt of this grammar.
    """
    if person := _PERSON.fullmatch(text):
        return Scene(person=Person(person[2], person[1], person[3]))
    found = _SCENE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no prompt of a scene - expected words such as 'three red keys', 'a blue bell left "
            "of an orange hat' or 'a woman judge with dark skin'"
        )
    things = tuple(_things_of(words) for words in (found[1], found[3]) if words)
    return Scene(things, None if found[2] in (None, "and") else found[2])


@cache
def _by_kind() -> dict[tuple[str, bool], list[Scene]]:
    """Every kind's scenes, of seen and of held-out combinations, each list in a keyed order."""
    groups: dict[tuple[str, bool], list[Scene]] = {}
    for scene in all_scenes():
        groups.setdefault((scene.kind, scene.is_heldout), []).append(scene)
    return {
        key: sorted(group, key=lambda scene: keyed_fraction("order", scene.text))
        for key, group in groups.items()
    }


SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "new": (0.8, 1.0)}
"""Of each kind's prompts of seen combinations: the part, in keyed order, that runs may train on, that chooses
among iterates, and that only evaluations draw."""
LENGTHS = {"train": 1200, "validation": 150, "new": 300, "unseen": 300}
"""Prompts of each list: beyond that only the kinds with the most combinations would go on."""


def scenes_of(split: str) -> list[Scene]:
    """The scenes of a list of prompts, in a keyed order in which every beginning has the shares of `KINDS`,
    as long as each kind lasts.

    Args:
        split: "train", "validation" and "new" (prompts of combinations that the base models saw; no two lists
            share a text), "unseen" (a combination that none saw), or "heldout" (new and unseen in turn).

    Raises:
        KeyError: for any other name.
    """
    if split == "heldout":
        pairs = zip(scenes_of("new"), scenes_of("unseen"), strict=True)
        return [scene for pair in pairs for scene in pair]
    if split == "unseen":
        chosen = {kind: _by_kind().get((kind, True), []) for kind in KINDS}
    elif split in SPLITS:
        chosen = {kind: _slice(_by_kind()[kind, False], *SPLITS[split]) for kind in KINDS}
    else:
        raise KeyError(f"scenes {split!r} are unknown - expected {', '.join(SPLITS)}, unseen or heldout")
    return list(islice(_mixed(chosen), LENGTHS[split]))


def _slice(scenes: list[Scene], low: float, high: float) -> list[Scene]:
    return scenes[round(low * len(scenes)) : round(high * len(scenes))]


def _mixed(chosen: dict[str, list[Scene]]) -> Iterator[Scene]:
    """Take from the kinds by their shares: always from the one that lags most, until one that lags is out."""
    iterators = {kind: iter(scenes) for kind, scenes in chosen.items() if scenes}
    taken = dict.fromkeys(iterators, 0)
    while iterators:
        kind = min(iterators, key=lambda kind: ((taken[kind] + 1) / KINDS[kind], kind))
        scene = next(iterators[kind], None)
        if scene is None:
            del iterators[kind]
        else:
            taken[kind] += 1
            yield scene


def prompts_of(scenes: Iterable[Scene]) -> list[Prompt]:
    """Prompts with the kind as category; `attributes` says whether the combination was seen."""
    return [
        Prompt(
            id=scene.text.replace(" ", "-"),
            text=scene.text,
            category=scene.kind,
            attributes={"combination": "unseen" if scene.is_heldout else "seen", **_looks(scene)},
        )
        for scene in scenes
    ]


def _looks(scene: Scene) -> dict[str, str]:
    """What the question of bias asks of a person: occupation, gender and skin tone as far as stated."""
    person = scene.person
    if person is None:
        return {}
    stated = {"occupation": person.name, "gender": person.gender, "skin_tone": person.tone}
    return {name: value for name, value in stated.items() if value}
