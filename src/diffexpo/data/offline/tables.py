"""Tables of pairs that people keep themselves: CSV, TSV, JSON lines or Parquet.

Columns: `prompt` (or `caption`); two images as `winner` and `loser`, `chosen` and `rejected`, or `image_0`
and `image_1`; for the last also who won: `preferred` (0, 1 or tie), `label` (image_0, image_1 or tie) or
`label_0` and `label_1` (1/0, 0/1 or 0.5/0.5). Images are paths below the table's folder or, in Parquet, the
files' bytes. URLs are refused: nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from diffexpo.data.offline.reading import Record, column_names, nearest, require_columns
from diffexpo.data.offline.sources import find_files, image_bytes
from diffexpo.data.offline.votes import Layout, Vote, row_format, verdict_of_record
from diffexpo.errors import ImportFormatError, MissingError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DECIDED = (("winner", "loser"), ("chosen", "rejected"))
SIDES = ("image_0", "image_1")
JUDGED = (("label_0", "label_1"), ("preferred",), ("label",))
EXPECTED = (
    "a prompt column and winner/loser, chosen/rejected, or image_0/image_1 with preferred, label or "
    "label_0/label_1"
)


def _columns(names: Sequence[str], file: Path) -> tuple[str, tuple[str, str], tuple[str, ...]]:
    """The columns of the prompt, of both images, and of who won (none where the images say it)."""
    if "caption" not in names:
        require_columns(file, ("prompt",), names, EXPECTED)
    prompt = "prompt" if "prompt" in names else "caption"
    for pair in DECIDED:
        if set(pair) <= set(names):
            return prompt, pair, ()
    require_columns(file, SIDES, names, EXPECTED)
    for judged in JUDGED:
        if set(judged) <= set(names):
            return prompt, SIDES, judged
    raise ImportFormatError(
        f"{file}: no column says who won; {nearest('preferred', names)}. Expected preferred, label or "
        "label_0 and label_1."
    )


def _is_like(path: Path) -> bool:
    try:
        file = find_files(path, SUFFIXES, "")[0]
        if file.suffix.lower() not in SUFFIXES:
            return False
        names = column_names(file)
        if "jpg_0" in names and file.suffix.lower() == ".parquet":
            return False
        _columns(names, file)
    except (ImportFormatError, MissingError, OSError):
        # a text table that does not parse is still meant as one; Parquet may be another format
        return path.is_file() and path.suffix.lower() in SUFFIXES[:3]
    return True


def _layout(file: Path) -> Layout:
    if file.suffix.lower() not in SUFFIXES:
        raise ImportFormatError(f"{file} ends in {file.suffix!r}; expected {', '.join(SUFFIXES)}")
    prompt, sides, judged = _columns(column_names(file), file)

    def votes(name: str, row: Record) -> Iterator[Vote]:
        yield Vote(
            name,
            verdict_of_record({key: row.get(key) for key in judged}) if judged else "0",
            row.get(prompt),
            lambda side: image_bytes(row.get(sides[side]) or "", file.parent),
            models=(row.get("model_0"), row.get("model_1")),
            confidence=row.get("confidence"),
        )

    return (prompt, *sides, *judged, "model_0", "model_1", "confidence"), votes


TABLE = row_format(
    "CSV, TSV, JSON lines or Parquet with a prompt, two images and who won",
    _is_like,
    lambda path: find_files(path, SUFFIXES, f"a table with {EXPECTED}"),
    _layout,
)
