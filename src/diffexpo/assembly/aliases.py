"""Embedded names (`emoji:...`, `prompts:...`) as the files and prompts they stand for."""

from __future__ import annotations

from diffexpo.data.prompts import load_prompts, shipped_prompts
from diffexpo.errors import MissingError
from diffexpo.types import Prompt
from diffexpo.worlds.emoji import ASSETS, animal_prompts, asset_path, heldout_prompts, train_prompts

EMBEDDED = "emoji:"
PROMPTS = "prompts:"


def resolve(path: str) -> str:
    """An embedded alias (`emoji:NAME`, `prompts:NAME`) as the folder or file it stands for; anything else
    unchanged. A MissingError of a name that is not shipped lists what is."""
    if path.startswith(PROMPTS):
        return str(shipped_prompts(path.removeprefix(PROMPTS)))
    if path.startswith(EMBEDDED):
        try:
            return str(asset_path(path.removeprefix(EMBEDDED)))
        except KeyError as error:
            raise MissingError(f"there is no {path!r}: {error.args[0]}") from error
    return path


def named_prompts(source: str, key: str) -> list[Prompt]:
    """Prompts of an embedded set or of a file; `key` is the setting that names it."""
    if source == "emoji:train":
        return train_prompts()
    if source == "emoji:animals":
        return animal_prompts()
    if source.startswith("emoji:heldout"):
        _, _, kind = source.partition("heldout")
        return heldout_prompts(kind.lstrip("-") or "all")
    return load_prompts(resolve(source), key)


def missing_assets() -> list[str]:
    """Names of the embedded world's files and folders that are not where the package should have them."""
    return [name for name in ASSETS if not asset_path(name).exists()]
