"""Preference sets in the Pick-a-Pic columns (v1 and v2): caption, two JPEGs, and who won.

A row becomes a pair when `has_label` is not false and its labels are 1 and 0. Ties (0.5) and unlabelled
rows are dropped and counted; rows that cannot be used are quarantined: counted by reason, the first ones
named. Nothing is dropped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.images import decode_image
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.rng import keyed_seed

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", "reward_margin")
_ROWS = 64
_EXAMPLES = 20


@dataclass(frozen=True)
class OfflinePair:
    """One labelled row, winner first. `row` is "file:row number", its name in reports and random numbers."""

    row: str
    caption: str
    winner_jpg: bytes
    loser_jpg: bytes
    winner_model: str | None = None
    loser_model: str | None = None
    winner_uid: str | None = None
    loser_uid: str | None = None
    margin: float | None = None


@dataclass
class ImportReport:
    """What became of the rows read: read = kept + ties + unlabelled + sum of quarantined (+ not selected by
    a limit).
    """

    read: int = 0
    kept: int = 0
    ties: int = 0
    unlabelled: int = 0
    unselected: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def quarantine(self, row: str, reason: str, count: int = 1) -> None:
        """Count a row that cannot be used."""
        self.quarantined[reason] = self.quarantined.get(reason, 0) + count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{row}: {reason}")

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ImportReport:
        """The report that `vars(report)` was stored as."""
        counts = [int(record[name]) for name in ("read", "kept", "ties", "unlabelled", "unselected")]
        return ImportReport(
            *counts, quarantined=dict(record["quarantined"]), examples=list(record["examples"])
        )

    def describe(self) -> str:
        """One line for a person."""
        bad = "".join(
            f", {count} quarantined ({reason})" for reason, count in sorted(self.quarantined.items())
        )
        limit = f", {self.unselected} beyond the limit" if self.unselected else ""
        dropped = f"{self.ties} ties, {self.unlabelled} unlabelled{limit}{bad}"
        return f"{self.kept} pairs of {self.read} rows ({dropped})"


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
    files = parquet_files(path)
    for file in files:
        _check_columns(file)
    selected = None if limit is None else _select(files, limit, seed)
    for file in files:
        for number, row in _rows(file, (*REQUIRED, *OPTIONAL)):
            report.read += 1
            name = f"{file.name}:{number}"
            verdict = _verdict(row)
            if verdict == "tie":
                report.ties += 1
            elif verdict == "unlabelled":
                report.unlabelled += 1
            elif verdict not in ("0", "1"):
                report.quarantine(name, verdict)
            elif selected is not None and name not in selected:
                report.unselected += 1
            else:
                try:
                    pair = _pair(name, row, int(verdict), check_images)
                except ImportFormatError as error:
                    report.quarantine(name, str(error))
                    continue
                report.kept += 1
                yield pair


def parquet_files(path: str | Path) -> list[Path]:
    """The Parquet files a source means, sorted by name."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        what = "holds no .parquet file" if path.is_dir() else "does not exist"
        raise MissingError(
            f"offline.source: {path} {what}; expected Parquet in the Pick-a-Pic v2 columns "
            f"({', '.join(REQUIRED)})"
        )
    return files


def _check_columns(file: Path) -> None:
    with _damage(file):
        schema = pq.read_schema(file)
    for name in REQUIRED:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, 1, cutoff=0.0)
            hint = f"the nearest present one is {near[0]!r}" if near else "there are none"
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


def _select(files: list[Path], limit: int, seed: int) -> frozenset[str]:
    names = [
        f"{file.name}:{number}"
        for file in files
        for number, row in _rows(file, ("label_0", "label_1", "has_label"))
        if _verdict(row) in ("0", "1")
    ]
    return frozenset(sorted(names, key=lambda name: (keyed_seed(seed, "offline", name), name))[:limit])


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, object]]]:
    number = 0
    with _damage(file), pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as parquet:
        present = [name for name in columns if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size=_ROWS, columns=present):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _verdict(row: Mapping[str, object]) -> str:
    """ "0" or "1" (who won), "tie", "unlabelled", or why the labels are unusable."""
    if row.get("has_label") is False:
        return "unlabelled"
    labels = (row["label_0"], row["label_1"])
    known = {(1.0, 0.0): "0", (0.0, 1.0): "1", (0.5, 0.5): "tie"}
    return known.get(labels, "labels are not 1/0, 0/1 or 0.5/0.5")


def _pair(name: str, row: Mapping[str, object], winner: int, check_images: bool) -> OfflinePair:
    loser = 1 - winner
    caption = row["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise ImportFormatError("no caption")
    images = [_bytes(row["jpg_0"]), _bytes(row["jpg_1"])]
    if images[0] == images[1]:
        raise ImportFormatError("both images are the same")
    if check_images:
        for data in images:
            decode_image(data)
    margin = row.get("reward_margin")
    return OfflinePair(
        row=name,
        caption=caption.strip(),
        winner_jpg=images[winner],
        loser_jpg=images[loser],
        winner_model=_text(row.get(f"model_{winner}")),
        loser_model=_text(row.get(f"model_{loser}")),
        winner_uid=_text(row.get(f"image_{winner}_uid")),
        loser_uid=_text(row.get(f"image_{loser}_uid")),
        margin=float(margin) if isinstance(margin, (int, float)) else None,
    )


def _bytes(value: object) -> bytes:
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise ImportFormatError("no bytes")
    return data


def _text(value: object) -> str | None:
    return str(value) if value else None


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Turns what Arrow raises on a damaged file into one clear error."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ImportFormatError(f"{file} is truncated or not Parquet ({error}); get it again") from error
