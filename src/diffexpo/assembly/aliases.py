"""Embedded names (`emoji:...`, `scenes:...`, `prompts:...`) as the files and prompts they stand for."""

from __future__ import annotations

from diffexpo.config.worlds import world_of
from diffexpo.data.prompts import load_prompts, shipped_prompts
from diffexpo.errors import MissingError
from diffexpo.types import Prompt
from diffexpo.worlds import asset_path, embedded_prompts, missing_assets

__all__ = ["missing_assets", "named_prompts", "resolve"]

PROMPTS = "prompts:"


def resolve(path: str) -> str:
    """An embedded alias (`emoji:NAME`, `scenes:NAME`, `prompts:NAME`) as the folder or file it stands for;
    anything else unchanged. A MissingError of a name that is not shipped lists what is."""
    if path.startswith(PROMPTS):
        return str(shipped_prompts(path.removeprefix(PROMPTS)))
    world = world_of(path)
    if world is None:
        return path
    try:
        return str(asset_path(world, path.partition(":")[2]))
    except KeyError as error:
        raise MissingError(f"there is no {path!r}: {error.args[0]}") from error


def named_prompts(source: str, key: str) -> list[Prompt]:
    """Prompts of an embedded set or of a file; `key` is the setting that names it."""
    prompts = embedded_prompts(source)
    return load_prompts(resolve(source), key) if prompts is None else prompts
