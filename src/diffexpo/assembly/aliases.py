"""Embedded names (`emoji:...`, `scenes:...`, `prompts:...`) as the files and prompts they stand for."""

from __future__ import annotations

from diffexpo.config.iterates import folder_of_model
from diffexpo.data.prompts import read_prompts, shipped_prompts
from diffexpo.types import Prompt
from diffexpo.worlds import embedded_prompts, local_path, missing_assets

__all__ = ["missing_assets", "named_prompts", "negative_prompts", "read_named", "resolve", "resolve_model"]

PROMPTS = "prompts:"


def resolve(path: str) -> str:
    """An embedded alias (`emoji:NAME`, `scenes:NAME`, `prompts:NAME`) as the folder or file it stands for;
    anything else unchanged. A MissingError of a name that is not shipped lists what is."""
    if path.startswith(PROMPTS):
        return str(shipped_prompts(path.removeprefix(PROMPTS)))
    return local_path(path)


def resolve_model(path: str) -> str:
    """`model.path` as a folder or hub id: an alias as `resolve` does, a run or iterate (RUN@2) as the folder
    of its whole model, which `actions.write_model` makes."""
    return folder_of_model(resolve(path))


def named_prompts(source: str, key: str) -> list[Prompt]:
    """Prompts of an embedded set or of a file; `key` is the setting that names it."""
    return read_named(source, key)[0]


def read_named(source: str, key: str) -> tuple[list[Prompt], str]:
    """Prompts as `named_prompts` gives them, and what was left out of a text file in words, or ""."""
    prompts = embedded_prompts(source)
    if prompts is not None:
        return prompts, ""
    found, report = read_prompts(resolve(source), key)
    lines = f"{report.skipped} comment and blank line{'s' * (report.skipped != 1)}"
    return found, f"{key} = {source}: {lines} skipped, {report.kept} kept" if report.skipped else ""


def negative_prompts(source: str | None) -> tuple[list[str], str]:
    """Texts of `explore.negatives.source` (none for None), and what was left out as `read_named` says it."""
    if source is None:
        return [], ""
    found, skipped = read_named(source, "explore.negatives.source")
    return [prompt.text for prompt in found], skipped
