"""Tables of pairs that people keep themselves: CSV, TSV, JSON lines or Parquet.

Columns: `prompt` (or `caption`); two pictures as `winner` and `loser`, `chosen` and `rejected`, or `image_0`
and `image_1`; for the last also who won: `preferred` (0, 1 or tie), `label` (image_0, image_1 or tie) or
`label_0` and `label_1` (1/0, 0/1 or 0.5/0.5). Pictures are paths below the table's folder or, in Parquet, the
files' bytes. URLs are
refused: nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffexpo.data.offline.base import (
    Format,
    PictureFolder,
    Vote,
    find_files,
    row_name,
    skip_votes,
    verdict_of_record,
)
from diffexpo.data.offline.reading import (
    Damage,
    Record,
    csv_header,
    csv_rows,
    json_lines,
    nearest,
    parquet_rows,
    parquet_schema,
)
from diffexpo.errors import ImportFormatError, MissingError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PROMPTS = ("prompt", "caption")
DECIDED = (("winner", "loser"), ("chosen", "rejected"))
SIDES = ("image_0", "image_1")
JUDGED = (("label_0", "label_1"), ("preferred",), ("label",))
EXTRA = ("model_0", "model_1", "confidence")
EXPECTED = "a prompt column and winner/loser, chosen/rejected, or image_0/image_1 with preferred, label or label_0/label_1"


@dataclass(frozen=True)
class _Layout:
    """Which columns hold what."""

    prompt: str
    pictures: tuple[str, str]
    judged: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prompt, *self.pictures, *self.judged, *EXTRA)


def _layout(names: Sequence[str], file: Path) -> _Layout:
    prompt = next((name for name in PROMPTS if name in names), None)
    if prompt is None:
        raise ImportFormatError(
            f"{file}: column 'prompt' is missing; {nearest('prompt', names)}. Expected {EXPECTED}."
        )
    for pair in DECIDED:
        if all(name in names for name in pair):
            return _Layout(prompt, pair, ())
    for name in SIDES:
        if name not in names:
            raise ImportFormatError(
                f"{file}: column {name!r} is missing; {nearest(name, names)}. Expected {EXPECTED}."
            )
    judged = next((group for group in JUDGED if all(name in names for name in group)), None)
    if judged is None:
        raise ImportFormatError(
            f"{file}: no column says who won; {nearest('preferred', names)}. Expected preferred, label or "
            "label_0 and label_1."
        )
    return _Layout(prompt, SIDES, judged)


def _names(file: Path) -> list[str]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet_schema(file).names
    if suffix in (".csv", ".tsv"):
        return csv_header(file, _delimiter(file))
    for _, row in islice(json_lines(file), 100):
        if isinstance(row, dict):
            return list(row)
    raise ImportFormatError(f"{file}: none of the first 100 lines is a JSON object; expected one a line")


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _is_like(path: Path) -> bool:
    try:
        file = find_files(path, SUFFIXES, "")[0]
        if file.suffix.lower() not in SUFFIXES:
            return False
        names = _names(file)
        if "jpg_0" in names and file.suffix.lower() == ".parquet":
            return False
        _layout(names, file)
    except (ImportFormatError, MissingError, OSError):
        # a text table that does not parse is still meant as one; Parquet may be another format
        return not path.is_dir() and path.is_file() and path.suffix.lower() in (".csv", ".tsv", ".jsonl")
    return True


def _files(path: Path) -> list[Path]:
    files = find_files(path, SUFFIXES, f"a table with {EXPECTED}")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ImportFormatError(f"{file} ends in {file.suffix!r}; expected {', '.join(SUFFIXES)}")
        _layout(_names(file), file)
    return files


def _votes(path: Path, start: int) -> Iterator[Vote]:
    return skip_votes((vote for file in _files(path) for vote in _file_votes(path, file)), start)


def _file_votes(root: Path, file: Path) -> Iterator[Vote]:
    layout = _layout(_names(file), file)
    folder = PictureFolder(file.parent)
    for number, row in _rows(file, layout.columns):
        yield _vote(row_name(root, file, number), row, layout, folder)


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record | Damage]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(file, columns)
    return json_lines(file) if suffix == ".jsonl" else csv_rows(file, _delimiter(file))


def _vote(name: str, row: Record | Damage, layout: _Layout, folder: PictureFolder) -> Vote:
    if isinstance(row, Damage):
        return Vote(name, row.reason, count=row.count)
    return Vote(
        name,
        verdict_of_record({key: row.get(key) for key in layout.judged}) if layout.judged else "0",
        row.get(layout.prompt),
        lambda side: _picture(row.get(layout.pictures[side]), folder),
        models=(row.get("model_0"), row.get("model_1")),
        confidence=_confidence(row.get("confidence")),
    )


def _picture(value: Any, folder: PictureFolder) -> object:
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return value if isinstance(value, (bytes, dict)) else folder.read(value)


def _confidence(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) and value else value
    except ValueError:
        return None


TABLE = Format(
    summary="CSV, TSV, JSON lines or Parquet with a prompt, two pictures and who won",
    is_like=_is_like,
    files=_files,
    votes=_votes,
)
