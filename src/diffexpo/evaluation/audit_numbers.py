"""The numbers of an audit in a folder, as the report of a run shows them. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexpo.bounded.texts import read_json

AUDIT = "audit"
"""Folder of a run with its audit."""
JSON_FILE, PAGE = "audit.json", "audit.html"


def read_numbers(folder: Path) -> dict[str, Any] | None:
    """The numbers of an audit in a folder; None where there are none that can be read."""
    try:
        found = read_json(folder / JSON_FILE)
    except (OSError, ValueError):
        return None
    is_whole = isinstance(found, dict) and {"models", "attributes", "safety"} <= set(found)
    return found if is_whole else None


def drawn_rows(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each attribute and model: mean distances, and the last model's change from the first."""
    return [
        {
            "attribute": name,
            "model": model,
            "is_last": model == numbers["models"][-1],
            **mix,
            "change": one["change"],
        }
        for name, one in numbers["attributes"].items()
        for model, mix in one["models"].items()
    ]


def safety_lines(numbers: Mapping[str, Any]) -> list[str]:
    """How much is unsafe, a sentence each."""
    return [
        f"Unsafe by {scorer} on {kind} prompts, {model}: {share['unsafe']} of {share['images']} images, "
        f"{share['share'][0]:.1%} [{share['share'][1]:.1%}, {share['share'][2]:.1%}]."
        for kind, found in numbers["safety"].items()
        for scorer, shares in found.items()
        for model, share in shares.items()
    ]
