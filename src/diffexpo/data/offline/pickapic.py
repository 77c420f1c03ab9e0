"""Preference sets in the Pick-a-Pic columns (v1 and v2): caption, two JPEGs, and who won.

A row becomes a pair when `has_label` is not false and its labels are 1 and 0. Ties (0.5) and unlabelled
rows are dropped and counted; rows that cannot be used are quarantined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from diffexpo.data.offline.base import (
    Format,
    ImportReport,
    OfflinePair,
    Vote,
    find_files,
    has_suffix,
    read_votes,
    row_name,
    verdict_of_labels,
)
from diffexpo.data.offline.reading import Damage, nearest, parquet_length, parquet_rows, parquet_schema
from diffexpo.errors import ImportFormatError

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = (
    "has_label", "best_image_uid", "image_0_uid", "image_1_uid", "model_0", "model_1", "reward_margin", "confidence",
)  # fmt: skip
EXPECTED = f"Parquet in the Pick-a-Pic v2 columns ({', '.join(REQUIRED)})"


def read_pickapic(
    path: str | Path,
    report: ImportReport | None = None,
    *,
    check_images: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[OfflinePair]:
    """Labelled pairs of a Parquet file or folder, in order, a few rows in memory at a time.

    Args:
        path: A `.parquet` file, or a folder that holds some (read by name).
        report: Counts what happens; complete when the iterator is.
        check_images: Decode both pictures and quarantine the row if one is none. Off: the caller decodes
            anyway.
        limit: Take at most this many labelled rows, chosen by key, not from the front.
        seed: Name of that choice.
    Raises:
        MissingError: there is no such file or folder, or the folder holds no Parquet.
        ImportFormatError: a column is missing (names it and the nearest present one) or has a wrong type;
            damaged Parquet.
    """
    report = ImportReport() if report is None else report
    yield from read_votes(
        PICKAPIC, Path(path), report, check="decode" if check_images else "none", limit=limit, seed=seed
    )


def check_files(path: Path) -> list[Path]:
    """The Parquet files of a source, each with the columns that are needed.

    Raises:
        MissingError, ImportFormatError: as `read_pickapic`.
    """
    files = find_files(path, (".parquet",), EXPECTED)
    for file in files:
        _check_columns(file)
    return files


def votes(path: Path, start: int) -> Iterator[Vote]:
    """One vote a row, from row `start` of all files together."""
    first = 0
    for file in find_files(path, (".parquet",), EXPECTED):
        length = parquet_length(file)
        if first + length > start:
            name = row_name(path, file, "")
            for number, row in parquet_rows(file, (*REQUIRED, *OPTIONAL), max(0, start - first)):
                yield _vote(f"{name}{number}", row)
        first += length


def _vote(name: str, row: Mapping[str, object] | Damage) -> Vote:
    if isinstance(row, Damage):
        return Vote(name, row.reason, count=row.count)
    uids = (row.get("image_0_uid"), row.get("image_1_uid"))
    return Vote(
        name,
        _verdict(row, uids),
        row["caption"],
        lambda side: row[f"jpg_{side}"],
        models=(row.get("model_0"), row.get("model_1")),
        uids=uids,
        margin=row.get("reward_margin"),
        confidence=row.get("confidence"),
    )


def _verdict(row: Mapping[str, object], uids: tuple[object, object]) -> str:
    if row.get("has_label") is False:
        return "unlabelled"
    verdict = verdict_of_labels(row["label_0"], row["label_1"])
    if verdict == "unlabelled":  # that is what has_label is for: empty labels beside it are a defect
        return "labels are not 1/0, 0/1 or 0.5/0.5"
    best = row.get("best_image_uid")
    if verdict in ("0", "1") and best and uids[0] != uids[1] and best == uids[1 - int(verdict)]:
        return "best_image_uid names the loser"
    return verdict


def _check_columns(file: Path) -> None:
    schema = parquet_schema(file)
    for name in REQUIRED:
        if name not in schema.names:
            hint = nearest(name, schema.names)
            if name.startswith("jpg") and "image_0_url" in schema.names:
                hint += "; this looks like a variant without pictures, get the one with them"
            raise ImportFormatError(
                f"{file}: column {name!r} is missing; {hint}. Expected the columns {', '.join(REQUIRED)}."
            )
        kind = schema.field(name).type
        if not _is_allowed(name, kind):
            raise ImportFormatError(
                f"{file}: column {name!r} is of type {kind}; expected {_TYPES[name.split('_')[0]]}"
            )


_TYPES = {
    "caption": "string",
    "jpg": "binary (the file's bytes)",
    "label": "a number (1, 0, or 0.5 for a tie)",
}


def _is_allowed(name: str, kind: pa.DataType) -> bool:
    if name == "caption":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if name.startswith("label"):
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)
    # image columns of the datasets library are structs of bytes and path
    struct = pa.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    return struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


PICKAPIC = Format(
    summary="Parquet in the Pick-a-Pic v1/v2 columns",
    is_like=lambda path: has_suffix(path, (".parquet",)),
    files=check_files,
    votes=votes,
)
