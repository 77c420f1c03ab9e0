"""The schema that editors check recipes by."""

from __future__ import annotations

import json

from diffexpo import __version__
from diffexpo.config.explain import settings
from diffexpo.config.json_schema import recipe_schema

SCHEMA = recipe_schema()


def test_its_id_is_that_of_the_version_and_format() -> None:
    assert SCHEMA["$id"] == f"urn:diffexpo:recipe:1:{__version__}"
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_group_is_there_and_may_be_left_out() -> None:
    assert "required" not in SCHEMA
    groups = {setting.path.partition(".")[0].partition("[")[0] for setting in settings()}
    assert groups == set(SCHEMA["properties"])


def test_every_reference_is_defined_and_settings_have_their_texts() -> None:
    text = json.dumps(SCHEMA)
    used = {part.partition('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert used == set(SCHEMA["$defs"])
    steps = SCHEMA["$defs"]["TrainingConfig"]["properties"]["steps"]
    assert steps["description"] == "Optimiser steps per iteration."
