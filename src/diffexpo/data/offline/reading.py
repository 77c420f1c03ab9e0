"""Rows of foreign files, a few in memory at a time: Parquet, CSV, TSV, JSON lines and JSON lists.

Each reader yields (number, row). A row that cannot be read is a `Damage` in the row's place, and the reader
goes on with the next; only a file that cannot be read at all is an ImportFormatError.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.bounded.texts import UnreadableError, parse_json, text_of
from diffexpo.data.rows import is_utf8
from diffexpo.errors import ImportFormatError

MAX_LINE = 2**20
MAX_ELEMENT = 2**20
_BATCH_ROWS = 64
_MIN_ROWS = 2
_BATCH_BYTES = 2**24
_BOMB_BYTES = 2**26
_BOMB_RATIO = 50
_CHUNK = 2**16
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Damage:
    """Rows that cannot be read, why, and how many they are."""

    reason: str
    count: int = 1


Record = dict[str, Any]


def read_rows(file: Path, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any]]:
    """Rows of a file by its ending, JSON lists for any other one; `columns` and `start` are for Parquet."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(file, columns, start)
    if suffix in (".csv", ".tsv"):
        return csv_rows(file)
    return json_lines(file) if suffix == ".jsonl" else json_list(file)


def column_names(file: Path) -> list[str]:
    """The columns of Parquet or CSV; the keys of the first object of JSON, none where a list is empty."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet_schema(file).names
    if suffix in (".csv", ".tsv"):
        return csv_header(file)
    if suffix != ".jsonl":
        first = next(json_list(file), (0, None))[1]
        return list(first) if isinstance(first, dict) else []
    for _, row in islice(json_lines(file), 100):
        if isinstance(row, dict):
            return list(row)
    raise ImportFormatError(f"{file}: none of the first 100 lines is a JSON object; expected one a line")


def require_columns(
    file: Path, needed: Sequence[str], present: Sequence[str], expected: str, hint: str = ""
) -> None:
    """Refuse a file that lacks a column."""
    for name in needed:
        if name not in present:
            raise ImportFormatError(
                f"{file}: column {name!r} is missing; {nearest(name, present)}{hint}. Expected {expected}."
            )


def nearest(name: str, present: Sequence[str]) -> str:
    """ "the nearest present one is 'x'", for the message about a missing column."""
    near = difflib.get_close_matches(name, present, 1, cutoff=0.0)
    return f"the nearest present one is {near[0]!r}" if near else "there are none"


def _distinct(file: Path, names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ImportFormatError(f"{file}: column {twice[0]!r} is there twice; rename or drop one of the two")
    return names


def parquet_schema(file: Path) -> pa.Schema:
    """The columns of a Parquet file, no two of one name."""
    with _damage(file):
        schema = pq.read_schema(file)
    _distinct(file, schema.names)
    return schema


def parquet_rows(file: Path, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Record | Damage]]:
    """Rows of a Parquet file from number `start` on, with those of the columns that it has.

    A row group that does not decode, or unpacks to fifty times its size (images do not), is one `Damage`.
    """
    with _damage(file):
        parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
    with parquet:
        present = [name for name in columns if name in parquet.schema_arrow.names]
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if rows < 0:
                raise ImportFormatError(
                    f"{file} is truncated or not Parquet (a negative row count); get it again"
                )
            if first + rows > start:
                yield from _group_rows(parquet, group, first, max(start, first), present)
            first += rows


def parquet_length(file: Path) -> int:
    """Rows of a Parquet file, as its index says."""
    with _damage(file):
        return max(0, pq.read_metadata(file).num_rows)


def _group_rows(
    parquet: pq.ParquetFile, group: int, first: int, start: int, columns: list[str]
) -> Iterator[tuple[int, Record | Damage]]:
    metadata = parquet.metadata.row_group(group)
    end = first + metadata.num_rows
    sizes = [_column_size(metadata.column(i)) for i in range(metadata.num_columns)]
    if any(whole > _BOMB_BYTES and whole > _BOMB_RATIO * packed for whole, packed, _ in sizes):
        yield start, Damage("row group unpacks to more than fifty times its size", end - start)
        return
    number = first
    with suppress(pa.ArrowException, OSError, ValueError):
        most = _rows_at_once(metadata, columns)
        batches = parquet.iter_batches(most, row_groups=[group], columns=columns, use_threads=False)
        for row in chain.from_iterable(map(_rows, batches)):
            if start <= number < end:
                yield number, row
            number += 1
    if number < end:
        stopped = max(number, start)
        yield stopped, Damage("damaged Parquet: these rows do not decode", end - stopped)


def _rows_at_once(metadata: pq.RowGroupMetaData, columns: list[str]) -> int:
    """How many rows of a group may be in memory: fewer of those that could be large."""
    worst = 1
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema.split(".", 1)[0] in columns:
            whole, _, dictionary = _column_size(column)
            worst += max(whole // max(1, metadata.num_rows), dictionary)
    # two rows at least, which cost half as much as one at a time
    return max(_MIN_ROWS, min(_BATCH_ROWS, _BATCH_BYTES // worst))


def _rows(batch: pa.RecordBatch) -> list[Record | Damage]:
    """The rows of a batch; one by one only where a value of one of them cannot be read."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]
        is_text = isinstance(error, UnicodeDecodeError)
        return [Damage("text is not UTF-8" if is_text else "a value cannot be read")]


def _column_size(column: pq.ColumnChunkMetaData) -> tuple[int, int, int]:
    """(unpacked, packed, unpacked size of the dictionary): one dictionary entry can be in every row."""
    whole, packed = max(0, column.total_uncompressed_size), max(1, column.total_compressed_size)
    start = column.dictionary_page_offset if column.has_dictionary_page else None
    dictionary = max(0, column.data_page_offset - start) * whole // packed if start is not None else 0
    return whole, packed, min(dictionary, whole)


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Turns what Arrow raises on a damaged file into one clear error."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ImportFormatError(f"{file} is truncated or not Parquet ({error}); get it again") from error


class _TooLong(Exception):
    """A line that would fill the memory."""


def _bounded(stream: Any) -> Iterator[Any]:
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise _TooLong(f"a line longer than {MAX_LINE:,}")
        yield line


def _csv_reader(file: Path, stream: Any) -> Any:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    return csv.reader(_bounded(stream), delimiter=delimiter, strict=True)


def csv_header(file: Path) -> list[str]:
    """The column names of a CSV file, no two the same."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        try:
            header: list[str] = next(_csv_reader(file, stream), [])
        except (csv.Error, _TooLong) as error:
            raise ImportFormatError(f"{file} has no readable header line ({error}); is it CSV?") from error
    names = [name.strip() for name in header]
    if not any(names) or not all(map(is_utf8, names)):
        raise ImportFormatError(f"{file} has no header line in UTF-8; expected the column names")
    return _distinct(file, names)


def csv_rows(file: Path) -> Iterator[tuple[int, Record | Damage]]:
    """Rows of a CSV file (TSV by its ending) after its header, as texts by column name."""
    names = csv_header(file)
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = _csv_reader(file, stream)
        next(reader)
        number = 0
        while True:
            try:
                cells = next(reader)
                if len(cells) != len(names):
                    yield number, Damage("not one cell a column")
                elif not all(map(is_utf8, cells)):
                    yield number, Damage("text is not UTF-8")
                else:
                    yield number, dict(zip(names, cells, strict=True))
            except StopIteration:
                return
            except csv.Error:
                yield number, Damage("not CSV")
            except _TooLong:
                yield number, Damage(f"a line longer than {MAX_LINE:,} characters; the rest is not read")
                return
            number += 1


def text_in(data: bytes, encoding: str = "utf-8-sig") -> str:
    """Bytes as text; otherwise an ImportFormatError with a reason that can be counted."""
    try:
        return text_of(data, encoding)
    except UnreadableError as error:
        raise ImportFormatError("text is not UTF-8") from error


def object_of(data: bytes, encoding: str = "utf-8-sig") -> Record:
    """Bytes as a JSON object; otherwise an ImportFormatError with a reason that can be counted."""
    text = text_in(data, encoding)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ImportFormatError("not JSON") from error
    if not isinstance(value, dict):
        raise ImportFormatError("not a JSON object")
    return value


def json_lines(file: Path) -> Iterator[tuple[int, Record | Damage]]:
    """Objects of a JSON-lines file."""
    number = -1
    with open(file, "rb") as stream:
        try:
            for number, line in enumerate(_bounded(stream)):
                try:
                    yield number, object_of(line, "utf-8" if number else "utf-8-sig")
                except ImportFormatError as error:
                    yield number, Damage(str(error))
        except _TooLong:
            yield number + 1, Damage(f"a line longer than {MAX_LINE:,} bytes; the rest is not read")


def json_list(file: Path) -> Iterator[tuple[int, Any]]:
    """Elements of a file that is one JSON list, parsed one at a time: the list may exceed the memory."""
    _check_list(file)
    with open(file, "rb") as stream:
        text, number = _JsonText(stream), 0
        try:
            text.take("[")
            while text.peek() != "]":
                if number > 0:
                    text.take(",")
                yield number, text.value()
                number += 1
        except (ValueError, RecursionError):
            yield number, Damage("not JSON in UTF-8 from here on; the rest is not read")


class _JsonText:
    """The part of a JSON file that is still to be parsed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._grow(_CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self, mark: str) -> None:
        """Step over a character, which must be this one."""
        if self.peek() != mark:
            raise ValueError(f"expected {mark}")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                found, self._at = self._parse(self._text, self._at)
                return found
            except json.JSONDecodeError:
                held = len(self._text) - self._at
                if held > MAX_ELEMENT or not self._grow(max(_CHUNK, held)):
                    raise

    def _grow(self, size: int) -> bool:
        chunk = self._stream.read(size)
        self._text, self._at = self._text[self._at :] + self._decode(chunk, not chunk), 0
        return bool(chunk)


def _check_list(file: Path) -> None:
    with open(file, "rb") as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 4096))
        tail = stream.read().rstrip()
    if head[:1] != b"[":
        raise ImportFormatError(f"{file} is not a JSON list; expected it to begin with '['")
    if tail and tail[-1:] != b"]":
        raise ImportFormatError(f"{file} is truncated: a JSON list ends with ']'; get it again")
