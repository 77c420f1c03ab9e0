"""The pictures, captions, attributes, splits and prompts of the emoji world."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from diffexpo.emoji import dataset
from diffexpo.emoji.build import build_dataset, read_attributes
from diffexpo.errors import DataError

ROWS = dataset.load_rows()
TRAIN = dataset.train_prompts()


def test_each_style_holds_every_emoji_once() -> None:
    assert Counter(row["style"] for row in ROWS) == {"noto": 3786, "twemoji": 3786}
    assert len({row["id"] for row in ROWS}) == len(ROWS) == 7572


def test_every_occupation_exists_in_all_genders_and_tones() -> None:
    assert len(dataset.OCCUPATIONS) == 26
    wanted = {
        (style, occupation, gender, tone)
        for style in dataset.STYLES
        for occupation in dataset.OCCUPATIONS
        for gender in dataset.GENDERS
        for tone in dataset.SKIN_TONES
    }
    found = Counter(
        (r["style"], r["occupation"], r["gender"], r["skin_tone"]) for r in ROWS if r["occupation"]
    )
    assert set(found) == wanted and set(found.values()) == {1}


def test_attributes_agree_with_code_points_and_captions() -> None:
    points = {
        "light": "1F3FB",
        "medium-light": "1F3FC",
        "medium": "1F3FD",
        "medium-dark": "1F3FE",
        "dark": "1F3FF",
    }
    for row in ROWS:
        if row["skin_tone"] in points:
            assert points[row["skin_tone"]] in row["hexcode"].split("-")
            assert f"{row['skin_tone']} skin tone" in row["caption"] or row["subgroup"] == "skin-tone"
        if row["occupation"]:
            words = row["caption"].split(":")[0].split()
            assert ("woman" in words) == (row["gender"] == "woman")
            assert ("man" in words) == (row["gender"] == "man")


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [
        ("1F469-1F3FF-200D-1F692", ("woman", "dark")),
        ("1F575-FE0F-200D-2642-FE0F", ("man", "default")),
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF", ("", "")),
    ],
)
def test_reading_code_points(hexcode: str, expected: tuple[str, str]) -> None:
    assert read_attributes(hexcode, True) == expected


def test_no_concept_is_on_both_sides_of_the_split() -> None:
    sides: dict[str, set[str]] = {}
    for row in ROWS:
        sides.setdefault(row["concept"], set()).add(row["split_concept"])
    assert all(len(side) == 1 for side in sides.values())
    share = sum(side == {"heldout"} for side in sides.values()) / len(sides)
    assert 0.05 < share < 0.07
    assert not any(row["occupation"] for row in ROWS if row["split_concept"] == "heldout")


def test_heldout_triples_are_held_out_in_both_styles() -> None:
    held = {
        style: {
            (r["occupation"], r["gender"], r["skin_tone"])
            for r in ROWS
            if r["style"] == style and r["occupation"] and r["split_attributes"] == "heldout"
        }
        for style in dataset.STYLES
    }
    assert held["noto"] == held["twemoji"] and len(held["noto"]) >= 20


def test_heldout_prompts_are_no_train_prompts() -> None:
    texts = {prompt.text for prompt in TRAIN}
    ids = [prompt.id for prompt in TRAIN + dataset.heldout_prompts()]
    assert len(set(ids)) == len(ids)
    assert not texts & {prompt.text for prompt in dataset.heldout_prompts()}
    kinds = {kind: dataset.heldout_prompts(kind) for kind in ("concept", "attributes", "caption")}
    assert [prompt for prompts in kinds.values() for prompt in prompts] == dataset.heldout_prompts("all")
    animals = dataset.animal_prompts()
    assert len(animals) == 24 and {p.text for p in animals} <= texts and animals[0].text == "noto bat"
    held = dataset.heldout_prompts("animals")
    assert 60 < len(held) < 120 and {p.id for p in held} < set(ids) - {p.id for p in TRAIN}
    assert min(len(prompts) for prompts in kinds.values()) >= 50
    unseen = {row["concept"] for row in ROWS if row["split_concept"] == "heldout"}
    assert {prompt.attributes["concept"] for prompt in kinds["concept"]} == unseen
    assert not unseen & {prompt.attributes["concept"] for prompt in TRAIN}


def test_prompts_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib, sys\nfrom diffexpo.emoji import dataset\n"
        "text = '\\n'.join(f'{p.id}|{p.text}' for p in dataset.train_prompts() + dataset.heldout_prompts())\n"
        "print(hashlib.sha256(text.encode()).hexdigest(), 'torch' in sys.modules)"
    )
    mine = "\n".join(f"{p.id}|{p.text}" for p in TRAIN + dataset.heldout_prompts())
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [hashlib.sha256(mine.encode()).hexdigest(), "False"]


def test_judges_share_no_picture_and_no_word() -> None:
    owner: dict[str, set[tuple[str, str]]] = {}
    for row in ROWS:
        owner.setdefault(row["hexcode"], set()).add((row["style"], dataset.judge_of(row)))
        both = [set(dataset.judge_keywords(row, judge)) for judge in ("judge_train", "judge_heldout")]
        assert not both[0] & both[1] and both[0] | both[1] == set(row["keywords"])
    assert all({judge for _, judge in pairs} == {"judge_train", "judge_heldout"} for pairs in owner.values())


def test_images_are_pictures_on_white() -> None:
    images = dataset.load_images(["noto-1f525", "twemoji-1f525", "noto-2764"])
    assert images.dtype == np.float32 and images.shape == (3, 3, 64, 64)
    assert (images[:, :, 0, 0] == 1).all() and 0 <= images.min() < 0.5 and images.max() == 1
    heart = images[2, :, 32, 32]
    assert heart[0] > 0.7 and heart[1] < 0.4


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="noto-1f525"):
        dataset.load_images(["noto-nothing"])
    with pytest.raises(KeyError, match="judge_heldout"):
        dataset.asset_path("judge")
    with pytest.raises(KeyError, match="attributes"):
        dataset.heldout_prompts("captions")


def test_building_without_sources_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(DataError, match="emoji-datasource-google"):
        build_dataset(tmp_path, tmp_path / "images.parquet")


def test_negatives_are_short_distinct_lines() -> None:
    negatives = dataset.load_negatives()
    assert len(negatives) == len(set(negatives)) and 20 <= len(negatives) <= 40
    assert {"man", "blurry smudge"} <= set(negatives)
