"""Protocols of audits: the shipped ones are whole, and what is missing or wrong in one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo.config.audits import read_audit, shipped_audits
from diffexpo.errors import ConfigError, MissingError

CLIP = "classifier={name: reader, type: clip, path: emoji:judge_train}"
NSFW = "safety.classifiers=[{name: nsfw, type: open_nsfw}]"


def test_shipped_protocols() -> None:
    assert shipped_audits() == ["occupations", "scenes"]
    scenes = read_audit("scenes", ["images_per_prompt=4", "sampler.steps=2"])
    assert (scenes.images_per_prompt, scenes.sampler.steps, scenes.sampler.name) == (4, 2, "dpmpp")
    assert list(scenes.attributes) == ["gender", "skin_tone", "look"]
    named = read_audit("occupations", [CLIP, "labelled=photos"])
    assert named.classifier is not None and named.classifier.type == "clip"
    assert read_audit("occupations", [NSFW]).safety.neutral == "prompts:first_tries"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "classifier is not given: nobody says what an image shows"),
        ([CLIP], "labelled is not given: the classifier's error is unknown, and a biased one is no witness"),
        ([CLIP, "labelled=none", "imags_per_prompt=3"], "Did you mean images_per_prompt?"),
        ([CLIP, "labelled=none", "images_per_prompt=0"], "images_per_prompt = 0"),
        ([CLIP, "labelled=none", "sampler.steps.a=0"], "steps is a single value"),
        ([CLIP, "labelled"], "has no value; expected --set group.key=value"),
        (["classifier={name: reader, type: clip}", "labelled=none"], "classifier: type clip needs path"),
        (["classifier={name: people, type: human}", "labelled=none"], "does not score one image for a text"),
        ([CLIP, "labelled=none", "attributes.gender.values.man='{who}'"], "{who} stands for nothing"),
        (
            [CLIP, "labelled=none", "attributes.gender.values.man='{prompt}, a woman'"],
            "a different text for each",
        ),
        (
            [CLIP, "labelled=none", "attributes.gender.reference={all: {man: 0.5, women: 0.5}}"],
            "names women; expected",
        ),
        ([CLIP, "labelled=none", "attributes.gender.reference={all: {man: 0.5}}"], "sums to 0.5; expected 1"),
        ([NSFW, "safety.neutral=null"], "no prompts are drawn".replace("no prompts are", "nothing is")),
        (["attributes={}"], "nothing would be measured"),
        (["classifier={name: a, type: nobody}"], "classifier"),
    ],
)
def test_what_is_missing_or_wrong_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_audit("occupations", overrides)
    assert message in str(caught.value)


def test_a_protocol_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "prompts: a.txt\nlabelled: none\nattributes: {hat: {values: {yes: 'a hat', no: 'no hat'}}}\n"
    )
    assert read_audit(str(path), [CLIP]).attributes["hat"].values == {"yes": "a hat", "no": "no hat"}
    path.write_text("- a list\n")
    with pytest.raises(ConfigError, match="expected a YAML mapping"):
        read_audit(str(path))
    with pytest.raises(MissingError, match="there are occupations, scenes"):
        read_audit("scnes")
