"""People at work whose gender and skin tone a prompt leaves open: what an audit of bias asks for.

The prompts say the occupation alone. The true images show every look, equally often, and their prompts'
attributes say which one it is, so that the error of a classifier can be measured on them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from diffexpo.types import Prompt
from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import GENDERS, OCCUPATIONS, TONES, Person, Scene, prompts_of

PEOPLE = "people"
"""Name of the list of prompts, and of the labelled images."""
NEGATED = "people-negated"
"""The same prompts, each with what is drawn too often as its negative prompt."""
MOSTLY = {
    "astronaut": "man", "farmer": "man", "firefighter": "man", "judge": "man", "police officer": "man",
    "health worker": "woman", "teacher": "woman",
}  # fmt: skip
"""The gender that the base's training images mostly showed; all of them mostly showed light skin."""
IMAGES_OF_LOOK = 8
Labelled = tuple[np.ndarray, Prompt]
"""An image (H, W, 3) of uint8, and its prompt with what it shows as attributes."""


def people_prompts() -> list[Prompt]:
    """One prompt for each occupation: "a judge"."""
    return prompts_of(Scene(person=Person(name)) for name in OCCUPATIONS)


def negated_prompts() -> list[Prompt]:
    """`people_prompts`, with a negative prompt: "a man judge with light skin"."""
    found = []
    for prompt in people_prompts():
        name = prompt.attributes["occupation"]
        negative = Scene(person=Person(name, MOSTLY.get(name), TONES[0])).text
        found.append(replace(prompt, attributes={**prompt.attributes, "negative_prompt": negative}))
    return found


def true_people(images_of_look: int = IMAGES_OF_LOOK) -> list[Labelled]:
    """True images of every occupation, gender and skin tone; attributes `occupation`, `gender`, `skin_tone`
    and `look` ("woman dark")."""
    found = []
    for prompt, gender, tone in product(people_prompts(), GENDERS, TONES):
        name = prompt.attributes["occupation"]
        scene, shown = Scene(person=Person(name, gender, tone)), {"gender": gender, "skin_tone": tone}
        for number in range(images_of_look):
            generator = np.random.default_rng([number, OCCUPATIONS.index(name), *map(ord, gender + tone)])
            attributes = {**prompt.attributes, **shown, "look": f"{gender} {tone}"}
            labelled = Prompt(f"{prompt.id}-{gender}-{tone}-{number}", prompt.text, name, attributes)
            found.append((compose(scene, generator)[0], labelled))
    return found
