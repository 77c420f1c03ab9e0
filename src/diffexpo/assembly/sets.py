"""Prompt lists by name, as `diffexpo data prompts` uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffexpo.assembly.aliases import resolve
from diffexpo.config.suites import Suite
from diffexpo.data.prompt_lists import choose_categories, read_prompt_list, split_prompts, write_prompts


def import_prompts(
    source: str,
    to: Path,
    *,
    format: str,
    categories: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[str]:
    """Write a published prompt list, or those of its prompts that have one of the `categories`, and return
    lines that say what was written.

    With `shares` of named parts only the parts are written, chosen by key, each to `to` with "-NAME" before
    the ending.
    """
    found, report = read_prompt_list(resolve(source), format)
    if categories:
        found = choose_categories(found, list(categories))
    targets = {to: found}
    if shares:
        parts = split_prompts(found, dict(shares), seed)
        targets = {to.with_name(f"{to.stem}-{name}{to.suffix}"): part for name, part in parts.items()}
    skipped = f", {report.skipped} comments and blank lines skipped" if report.skipped else ""
    lines = [f"{source}: {report.read} read, {report.duplicates} came twice, {len(found)} chosen{skipped}"]
    for path, chosen in targets.items():
        write_prompts(chosen, path)
        kinds = {prompt.category for prompt in chosen}
        lines.append(f"{len(chosen)} prompts in {len(kinds)} categories: {path}")
    return lines


def import_command(suite: Suite) -> str:
    """Where the prompts of a published suite are, and the command that imports them."""
    assert suite.published is not None
    source = suite.published
    return (
        f"They are published at {source.where} (licence: {source.licence}). Import them once with: "
        f"diffexpo data prompts FILE-OR-FOLDER --format {source.format} --to {suite.prompts}"
    )
