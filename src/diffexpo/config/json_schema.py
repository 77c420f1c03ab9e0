"""The JSON schema of a recipe, by which editors complete and check YAML. Imports without torch."""

from typing import Any

from diffexpo import __version__
from diffexpo.config.run import RunConfig

FORMAT = 1
"""Grows when a recipe of before may not be valid any more."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe, in which every group and setting may be left out.

    `$id` names the package's version and the format: editors and catalogues tell two schemas apart by it.
    """
    found = RunConfig.model_json_schema()
    found["title"] = f"recipe of diffexpo {__version__}"
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:diffexpo:recipe:{FORMAT}:{__version__}",
    }
    return head | found
