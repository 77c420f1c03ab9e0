"""ImageRewardDB: one row a picture, its rank among the pictures of its prompt.

`metadata-train.parquet` (image_path, prompt_id, prompt, rank, ...) beside the unpacked `images/`, the JSON
file of one image folder with the same keys, or the benchmark's JSON list of {id, prompt, generations,
ranking}. The smallest rank is the best. The rows of a prompt need not be neighbours, so the index (not the
pictures) is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffexpo.data.offline.base import (
    MAX_RANKED,
    Format,
    PictureFolder,
    Vote,
    row_name,
    skip_votes,
    votes_of_ranking,
)
from diffexpo.data.offline.hpd import first_record, index_file
from diffexpo.data.offline.reading import Damage, json_list, nearest, parquet_rows, parquet_schema
from diffexpo.errors import ImportFormatError, MissingError

COLUMNS = ("image_path", "prompt_id", "prompt", "rank")
MAX_ROWS = 500_000
_METADATA = "metadata-train.parquet"


@dataclass
class _Group:
    """The pictures of one prompt."""

    prompt: object
    first: int
    paths: list[object] = field(default_factory=list)
    ranks: list[object] = field(default_factory=list)


def _is_like(path: Path) -> bool:
    try:
        file = _index(path)
        if file.suffix.lower() == ".parquet":
            names = parquet_schema(file).names
            return all(name in names for name in COLUMNS)
    except (ImportFormatError, MissingError):
        return False
    record = first_record(path)
    return all(key in record for key in COLUMNS) or ("generations" in record and "ranking" in record)


def _index(path: Path) -> Path:
    if path.is_dir() and (path / _METADATA).is_file():
        return path / _METADATA
    if path.is_dir() or path.suffix.lower() == ".json":
        return index_file(path)
    return index_file(path, suffix=".parquet")


def _files(path: Path) -> list[Path]:
    file = _index(path)
    if file.suffix.lower() != ".parquet":
        next(json_list(file), None)
        return [file]
    names = parquet_schema(file).names
    for name in COLUMNS:
        if name not in names:
            raise ImportFormatError(
                f"{file}: column {name!r} is missing; {nearest(name, names)}. Expected the columns "
                f"{', '.join(COLUMNS)}."
            )
    return [file]


def _votes(path: Path, start: int) -> Iterator[Vote]:
    return skip_votes(_all_votes(_index(path)), start)


def _all_votes(file: Path) -> Iterator[Vote]:
    folder = PictureFolder(file.parent)
    groups: dict[str, _Group] = {}
    for number, row in _rows(file):
        name = row_name(file, file, number)
        if number >= MAX_ROWS:
            yield Vote(name, f"beyond the first {MAX_ROWS:,} rows; split the metadata")
            return
        if isinstance(row, Damage):
            yield Vote(name, row.reason, count=row.count)
        elif not isinstance(row, dict):
            yield Vote(name, "not a JSON object")
        elif "generations" in row:
            yield from _ranking(name, row.get("prompt"), row["generations"], row.get("ranking"), folder)
        elif not isinstance(row.get("prompt_id"), str) or not row["prompt_id"]:
            yield Vote(name, "no prompt_id")
        else:
            group = groups.setdefault(row["prompt_id"], _Group(row.get("prompt"), number))
            if group.prompt != row.get("prompt"):
                yield Vote(name, "prompt_id names two prompts")
            elif len(group.paths) > MAX_RANKED:
                yield Vote(name, f"more than {MAX_RANKED} pictures in one ranking")
            elif row.get("image_path") in group.paths:
                yield Vote(name, "a picture is listed twice")
            else:
                group.paths.append(row.get("image_path"))
                group.ranks.append(row.get("rank"))
    for group in groups.values():
        name = row_name(file, file, group.first)
        if len(group.paths) == 1:
            yield Vote(name, "the only picture of its prompt")
        else:
            yield from _ranking(name, group.prompt, group.paths, group.ranks, folder)


def _ranking(row: str, prompt: object, paths: Any, ranks: object, folder: PictureFolder) -> Iterator[Vote]:
    load = None
    if isinstance(paths, list):
        load = [lambda path=path: _read(folder, path) for path in paths]
    return votes_of_ranking(row, prompt, ranks, load, paths if isinstance(paths, list) else None)


def _read(folder: PictureFolder, path: object) -> bytes:
    """The JSON files of image folders name pictures from the set's root, although they lie beside them."""
    if isinstance(path, str) and (folder.root / Path(path).name).is_file():
        return folder.read(Path(path).name)
    return folder.read(path)


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    return parquet_rows(file, COLUMNS) if file.suffix.lower() == ".parquet" else json_list(file)


IMAGEREWARDDB = Format(
    summary="ImageRewardDB: metadata-train.parquet beside the unpacked images, or its JSON",
    is_like=_is_like,
    files=_files,
    votes=_votes,
)
