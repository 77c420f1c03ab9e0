"""The table of images: code points become attributes, and splits hold whole concepts and combinations out."""

from __future__ import annotations

from collections import Counter

import pytest

from diffexpo.errors import DataError
from diffexpo.worlds import emoji
from worlds.emoji import attributes
from worlds.emoji.build import build_dataset, read_attributes

ROWS = emoji.load_rows()


def test_every_occupation_exists_in_all_genders_and_tones() -> None:
    assert len(attributes.OCCUPATIONS) == 26
    wanted = {
        (style, occupation, gender, tone)
        for style in attributes.STYLES
        for occupation in attributes.OCCUPATIONS
        for gender in attributes.GENDERS
        for tone in attributes.SKIN_TONES
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
        for style in attributes.STYLES
    }
    assert held["noto"] == held["twemoji"] and len(held["noto"]) >= 20


def test_building_without_sources_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(DataError, match="emoji-datasource-google"):
        build_dataset(tmp_path, tmp_path / "images.parquet")
