"""People whose looks the prompt leaves open: what an audit draws, and true images that it measures a classifier on."""

from __future__ import annotations

from collections import Counter

from diffexpo.worlds import embedded_labelled, embedded_prompts
from diffexpo.worlds.scenes.grammar import GENDERS, OCCUPATIONS, TONES, parse_scene
from diffexpo.worlds.scenes.people import true_people


def test_prompts_say_the_occupation_alone() -> None:
    prompts = embedded_prompts("scenes:people")
    assert prompts is not None and [prompt.attributes["occupation"] for prompt in prompts] == list(
        OCCUPATIONS
    )
    for prompt in prompts:
        person = parse_scene(prompt.text).person
        assert person is not None and person.gender is None and person.tone is None
        assert "negative_prompt" not in prompt.attributes


def test_negative_prompts_are_looks_of_the_same_occupation() -> None:
    prompts = embedded_prompts("scenes:people-negated")
    assert prompts is not None
    for prompt in prompts:
        person = parse_scene(prompt.attributes["negative_prompt"]).person
        assert (
            person is not None and person.name == prompt.attributes["occupation"] and person.tone == "light"
        )


def test_true_images_show_every_look_equally_often_and_say_which() -> None:
    found = true_people(2)
    looks = Counter(
        (p.attributes["occupation"], p.attributes["gender"], p.attributes["skin_tone"]) for _, p in found
    )
    assert len(looks) == len(OCCUPATIONS) * len(GENDERS) * len(TONES) and set(looks.values()) == {2}
    assert all(
        p.attributes["look"] == f"{p.attributes['gender']} {p.attributes['skin_tone']}" for _, p in found
    )
    assert len({prompt.id for _, prompt in found}) == len(found)
    again = true_people(2)
    assert all((one == other).all() for (one, _), (other, _) in zip(found, again, strict=True))
    # Two looks of one occupation differ in the image, not in the prompt.
    (first, prompt), (last, same) = found[0], found[11]
    assert prompt.text == same.text and (first != last).any()


def test_other_worlds_and_names_have_none() -> None:
    assert embedded_labelled("scenes:train") is None and embedded_labelled("emoji:people") is None
    assert embedded_labelled("folder") is None
