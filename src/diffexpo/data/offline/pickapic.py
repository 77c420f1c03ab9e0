"""Preference sets in the Pick-a-Pic columns (v1 and v2): caption, two JPEGs, and who won; and our own sets,
which `diffexpo data export` and `diffexpo data import` write in these columns.

A row becomes a pair when `has_label` does not say no and its labels are 1 and 0. Ties (0.5) and unlabelled
rows are dropped and counted; rows that cannot be used are quarantined.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from diffexpo.data.export import SCHEMA_VERSION
from diffexpo.data.offline.cells import is_false, text_of_id
from diffexpo.data.offline.reading import Record, parquet_rows, parquet_schema, require_columns
from diffexpo.data.offline.sources import find_files, has_suffix, image_bytes
from diffexpo.data.offline.votes import Layout, Vote, has_columns, row_format, verdict_of_labels
from diffexpo.errors import ImportFormatError

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = (
    "has_label", "best_image_uid", "image_0_uid", "image_1_uid", "model_0", "model_1", "reward_margin",
    "confidence",
)  # fmt: skip
MARK = ("pair_id", "schema_version", "jpg_0")
STARTED, FINISHED = "import.json", "manifest.json"
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_TYPES = {
    "caption": ("string", _TEXTS),
    "jpg": ("binary (the file's bytes)", (pa.types.is_binary, pa.types.is_large_binary)),
    "label": (
        "a number (1, 0, or 0.5 for a tie)",
        (*(pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal), *_TEXTS),
    ),
}


def _find(path: Path) -> list[Path]:
    return find_files(path, (".parquet",), f"Parquet in the Pick-a-Pic v2 columns ({', '.join(REQUIRED)})")


def _layout(file: Path) -> Layout:
    schema = parquet_schema(file)
    for name in REQUIRED:
        is_linked = name.startswith("jpg") and "image_0_url" in schema.names
        hint = "; this looks like a variant without images, get the one with them" if is_linked else ""
        require_columns(file, [name], schema.names, f"the columns {', '.join(REQUIRED)}", hint)
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        expected, tests = _TYPES[name.split("_")[0]]
        # image columns of the datasets library are structs of bytes and path, either of which may be empty
        is_image = name.startswith("jpg") and pa.types.is_struct(kind)
        is_image = is_image and any(kind.get_field_index(part) >= 0 for part in ("bytes", "path"))
        if not is_image and not any(test(kind) for test in tests):
            raise ImportFormatError(f"{file}: column {name!r} is of type {kind}; expected {expected}")
    return (*REQUIRED, *OPTIONAL), partial(_votes, file.parent)


def _votes(folder: Path, name: str, row: Record) -> Iterator[Vote]:
    uids = (row.get("image_0_uid"), row.get("image_1_uid"))
    yield Vote(
        name,
        _verdict(row, uids),
        row["caption"],
        lambda side: image_bytes(row[f"jpg_{side}"], folder),
        models=(row.get("model_0"), row.get("model_1")),
        uids=uids,
        margin=row.get("reward_margin"),
        confidence=row.get("confidence"),
    )


def _verdict(row: Record, uids: tuple[object, object]) -> str:
    if is_false(row.get("has_label")):
        return "unlabelled"
    verdict = verdict_of_labels(row["label_0"], row["label_1"])
    if verdict == "unlabelled":  # that is what has_label is for: empty labels are a defect
        return "labels are not 1/0, 0/1 or 0.5/0.5"
    best, named = text_of_id(row.get("best_image_uid")), [text_of_id(uid) for uid in uids]
    if verdict in ("0", "1") and best and named[0] != named[1] and best == named[1 - int(verdict)]:
        return "best_image_uid names the loser"
    return verdict


PICKAPIC = row_format(
    "Parquet in the Pick-a-Pic v1/v2 columns",
    lambda path: has_suffix(path, (".parquet",)),
    _find,
    _layout,
    is_vote_a_row=True,
)


_is_marked = has_columns(lambda path: _find(path)[0], (".parquet",), MARK)


def _find_ours(path: Path) -> list[Path]:
    if (path / STARTED).is_file() and not (path / FINISHED).is_file():
        raise ImportFormatError(
            f"{path} is an import that was not finished; repeat its `diffexpo data import` command to go on"
        )
    return _find(path)


def _layout_of_ours(file: Path) -> Layout:
    layout = _layout(file)
    _, row = next(parquet_rows(file, ("schema_version",)), (0, None))
    version = row.get("schema_version") if isinstance(row, dict) else None
    if version is not None and (not isinstance(version, int) or version > SCHEMA_VERSION):
        raise ImportFormatError(
            f"{file} has schema_version {version!r}, this version reads {SCHEMA_VERSION}; use the version "
            "that wrote it"
        )
    return layout


EXPORTED = row_format(
    "what `diffexpo data export` and `diffexpo data import` write",
    lambda path: (path / STARTED).is_file() or _is_marked(path),
    _find_ours,
    _layout_of_ours,
    is_vote_a_row=True,
)
