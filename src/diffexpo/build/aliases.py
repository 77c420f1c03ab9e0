"""Embedded names (`emoji:...`) as the files and prompts they stand for."""

from __future__ import annotations

from diffexpo.data.prompts import load_prompts
from diffexpo.emoji.dataset import asset_path, heldout_prompts, train_prompts
from diffexpo.types import Prompt

EMBEDDED = "emoji:"


def resolve(path: str) -> str:
    """An embedded alias (`emoji:NAME`) as the folder or file it stands for; anything else unchanged."""
    if path.startswith(EMBEDDED):
        return str(asset_path(path.removeprefix(EMBEDDED)))
    return path


def named_prompts(source: str, key: str) -> list[Prompt]:
    """Prompts of an embedded set or of a file; `key` is the setting that names it."""
    if source == "emoji:train":
        return train_prompts()
    if source.startswith("emoji:heldout"):
        _, _, kind = source.partition("heldout")
        return heldout_prompts(kind.lstrip("-") or "all")
    return load_prompts(source, key)
