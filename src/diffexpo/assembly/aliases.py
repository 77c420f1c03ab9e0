"""Embedded names (`emoji:...`, `scenes:...`, `prompts:...`) as the files and prompts they stand for."""

from __future__ import annotations

from diffexpo.data.prompts import load_prompts, shipped_prompts
from diffexpo.types import Prompt
from diffexpo.worlds import embedded_prompts, local_path, missing_assets

__all__ = ["missing_assets", "named_prompts", "resolve"]

PROMPTS = "prompts:"


def resolve(path: str) -> str:
    """An embedded alias (`emoji:NAME`, `scenes:NAME`, `prompts:NAME`) as the folder or file it stands for;
    anything else unchanged. A MissingError of a name that is not shipped lists what is."""
    if path.startswith(PROMPTS):
        return str(shipped_prompts(path.removeprefix(PROMPTS)))
    return local_path(path)


def named_prompts(source: str, key: str) -> list[Prompt]:
    """Prompts of an embedded set or of a file; `key` is the setting that names it."""
    prompts = embedded_prompts(source)
    return load_prompts(resolve(source), key) if prompts is None else prompts
