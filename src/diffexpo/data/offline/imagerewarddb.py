"""ImageRewardDB: one row per image, its rank among the images of its prompt.

`metadata-train.parquet` (image_path, prompt_id, prompt, rank, ...) next to the unpacked `images/`, the JSON
file of one image folder with the same keys, or the benchmark's JSON list of {id, prompt, generations,
ranking}. The smallest rank is the best. The rows of a prompt need not be neighbours, so the index (not the
images) is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffexpo.data.offline.reading import Damage, Record, column_names, read_rows, require_columns
from diffexpo.data.offline.sources import ImageFolder, index_file
from diffexpo.data.offline.votes import MAX_RANKED, Layout, Vote, has_columns, row_format, votes_of_ranking

COLUMNS = ("image_path", "prompt_id", "prompt", "rank")
MAX_ROWS = 500_000
_METADATA = "metadata-train.parquet"


@dataclass
class _Group:
    """The images of one prompt."""

    first: int
    prompt: object
    paths: list[object] = field(default_factory=list)
    ranks: list[object] = field(default_factory=list)

    def add(self, row: Record) -> str:
        """Take in an image; returns why it cannot be one of them, or ""."""
        if self.prompt != row.get("prompt"):
            return "prompt_id names two prompts"
        if len(self.paths) > MAX_RANKED:
            return f"more than {MAX_RANKED} pictures in one ranking"
        if row.get("image_path") in self.paths:
            return "a picture is listed twice"
        self.paths.append(row.get("image_path"))
        self.ranks.append(row.get("rank"))
        return ""


def _index(path: Path) -> Path:
    if path.is_dir() and (path / _METADATA).is_file():
        return path / _METADATA
    return index_file(path, suffix=".json" if path.is_dir() or path.suffix.lower() == ".json" else ".parquet")


def _rankings(file: Path, columns: Sequence[str], start: int) -> Iterator[tuple[int, Any]]:
    """(number, {prompt, generations, ranking} or damage): the rows themselves where they are rankings, then
    those that the rows of single images add up to."""
    groups: dict[str, _Group] = {}
    for number, row in read_rows(file, columns, start):
        if number >= MAX_ROWS:
            yield number, Damage(f"beyond the first {MAX_ROWS:,} rows; split the metadata")
            break
        if not isinstance(row, dict) or "generations" in row:
            yield number, row
            continue
        key = row.get("prompt_id")
        if not isinstance(key, str) or not key:
            yield number, Damage("no prompt_id")
            continue
        problem = groups.setdefault(key, _Group(number, row.get("prompt"))).add(row)
        if problem:
            yield number, Damage(problem)
    for group in groups.values():
        ranking = {"prompt": group.prompt, "generations": group.paths, "ranking": group.ranks}
        yield group.first, ranking if len(group.paths) > 1 else Damage("the only picture of its prompt")


def _layout(file: Path) -> Layout:
    names = column_names(file)
    if file.suffix.lower() == ".parquet":
        require_columns(file, COLUMNS, names, f"the columns {', '.join(COLUMNS)}")
    folder = ImageFolder(file.parent)

    def read(path: object) -> bytes:
        # the JSON files of image folders name images from the set's root, although they are next to them
        is_beside = isinstance(path, str) and (folder.root / Path(path).name).is_file()
        return folder.read(Path(str(path)).name if is_beside else path)

    def votes(name: str, row: Record) -> Iterator[Vote]:
        return votes_of_ranking(name, row.get("prompt"), row.get("ranking"), row["generations"], read)

    return Layout(COLUMNS, votes)


IMAGEREWARDDB = row_format(
    "ImageRewardDB: metadata-train.parquet next to the unpacked images, or its JSON",
    has_columns(_index, (".json", ".parquet"), COLUMNS, ("generations", "ranking")),
    lambda path: [_index(path)],
    _layout,
    rows=_rankings,
)
