"""Preference sets, prompt lists and stores by name, as the commands of `diffexpo data` use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffexpo.assembly.aliases import resolve
from diffexpo.data.offline.summary import inspect_offline, summarise_offline
from diffexpo.data.offline.writing import rewrite_pairs
from diffexpo.data.prompt_lists import choose_categories, read_prompt_list, split_prompts, write_prompts
from diffexpo.data.statistics import summarise_store
from diffexpo.data.store import Store


def import_pairs(
    source: str,
    to: Path,
    *,
    format: str,
    limit: int | None,
    seed: int,
    check: Literal["decode", "structure"],
    tick: Callable[[int], None],
) -> list[str]:
    """Write a preference set as Parquet shards and return the lines of the report.

    Up to five lines that show examples of unusable rows follow the summary.
    """
    report = rewrite_pairs(resolve(source), to, format=format, limit=limit, seed=seed, check=check, tick=tick)
    return [report.describe(), *(f"  {example}" for example in report.examples[:5])]


def inspect_set(source: str, format: str) -> dict[str, Any]:
    """Return what a preference set holds, without reading all of it."""
    return inspect_offline(resolve(source), format=format)


def count_set(source: str, *, format: str, limit: int | None, seed: int) -> dict[str, Any]:
    """Return counts of everything in a preference set."""
    return summarise_offline(resolve(source), format=format, limit=limit, seed=seed)


def count_store(run_dir: Path) -> dict[str, Any]:
    """Return counts of everything in a run's store."""
    return summarise_store(Store(run_dir / "store", create=False))


def verify_store(run_dir: Path) -> int:
    """Check every file of a run's store against its manifest and return their number."""
    return Store(run_dir / "store").verify()


def import_prompts(
    source: str,
    to: Path,
    *,
    format: str,
    categories: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[str]:
    """Write a published prompt list, or parts of it by key, and return lines that say what was written.

    Args:
        categories: Keep only prompts of these categories; all if empty.
        shares: Share of each named part; only the parts are written then, each to `to` with "-NAME" before
            the ending.
    """
    found, report = read_prompt_list(resolve(source), format)
    if categories:
        found = choose_categories(found, list(categories))
    targets = {to: found}
    if shares:
        parts = split_prompts(found, dict(shares), seed)
        targets = {to.with_name(f"{to.stem}-{name}{to.suffix}"): part for name, part in parts.items()}
    lines = [f"{source}: {report.read} read, {report.duplicates} came twice, {len(found)} chosen"]
    for path, chosen in targets.items():
        write_prompts(chosen, path)
        lines.append(
            f"{len(chosen)} prompts in {len({prompt.category for prompt in chosen})} categories: {path}"
        )
    return lines
