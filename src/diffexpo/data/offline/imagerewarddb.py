"""ImageRewardDB: one row per image, its rank among the images of its prompt.

`metadata-train.parquet` (image_path, prompt_id, prompt, rank, ...) next to the unpacked `images/`, the JSON
file of one image folder with the same keys, or the benchmark's JSON list of {id, prompt, generations,
ranking}. The smallest rank is the best. The rows of a prompt need not be neighbours, so the index (not the
images) is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffexpo.data.offline.cells import text_of_id
from diffexpo.data.offline.reading import Damage, Record, column_names, read_rows, require_columns
from diffexpo.data.offline.sources import index_file, read_image
from diffexpo.data.offline.votes import MAX_RANKED, Layout, Vote, has_columns, row_format, votes_of_ranking

COLUMNS = ("image_path", "prompt_id", "prompt", "rank")
MAX_ROWS = 500_000
_METADATA = "metadata-train.parquet"


def _index(path: Path) -> Path:
    if path.is_dir() and (path / _METADATA).is_file():
        return path / _METADATA
    return index_file(path, suffix=".json" if path.is_dir() or path.suffix.lower() == ".json" else ".parquet")


def _rankings(file: Path, columns: Sequence[str], start: int) -> Iterator[tuple[int, Any]]:
    """(number, {prompt, generations, ranking} or damage): first the rows that are rankings."""
    groups: dict[str, tuple[int, Record]] = {}
    for number, row in read_rows(file, columns, start):
        if number >= MAX_ROWS:
            yield number, Damage(f"beyond the first {MAX_ROWS:,} rows; split the metadata")
            break
        if not isinstance(row, dict) or "generations" in row:
            yield number, row
            continue
        key = text_of_id(row.get("prompt_id"))
        if key is None:
            yield number, Damage("no prompt_id")
            continue
        none: Record = {"prompt": row.get("prompt"), "generations": [], "ranking": []}
        _, ranking = groups.setdefault(key, (number, none))
        if problem := _problem(row, ranking):
            yield number, Damage(problem)
            continue
        ranking["generations"].append(row.get("image_path"))
        ranking["ranking"].append(row.get("rank"))
    for first, ranking in groups.values():
        is_alone = len(ranking["generations"]) < 2
        yield first, Damage("the only picture of its prompt") if is_alone else ranking


def _problem(row: Record, ranking: Record) -> str:
    """Why an image cannot be one of those of a prompt, or ""."""
    if ranking["prompt"] != row.get("prompt"):
        return "prompt_id names two prompts"
    if len(ranking["generations"]) > MAX_RANKED:
        return f"more than {MAX_RANKED} pictures in one ranking"
    return "a picture is listed twice" if row.get("image_path") in ranking["generations"] else ""


def _layout(file: Path) -> Layout:
    names = column_names(file)
    if file.suffix.lower() == ".parquet":
        require_columns(file, COLUMNS, names, f"the columns {', '.join(COLUMNS)}")

    def read(path: object) -> bytes:
        # the JSON files of image folders name images from the set's root, although they are next to them
        is_beside = isinstance(path, str) and (file.parent / Path(path).name).is_file()
        return read_image(file.parent, Path(str(path)).name if is_beside else path)

    def votes(name: str, row: Record) -> Iterator[Vote]:
        return votes_of_ranking(name, row.get("prompt"), row.get("ranking"), row["generations"], read)

    return COLUMNS, votes


IMAGEREWARDDB = row_format(
    "ImageRewardDB: metadata-train.parquet next to the unpacked images, or its JSON",
    has_columns(_index, (".json", ".parquet"), COLUMNS, ("generations", "ranking")),
    lambda path: [_index(path)],
    _layout,
    rows=_rankings,
)
