"""One Parquet shard of an import in the making: filled by one thread, written by another, visible when it is
whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.export import EXPORT_SCHEMA, SCHEMA_VERSION
from diffexpo.data.files import TEMPORARY, sha256_of, whole_file
from diffexpo.data.offline.ahead import Behind
from diffexpo.data.offline.base import OfflinePair
from diffexpo.errors import StoreError
from diffexpo.rng import keyed_choice

_GROUP_BYTES = 8 * 1024 * 1024
_GROUP_PAIRS = 256
STATE = b"diffexpo_import"
_PICTURES = ("jpg_0", "jpg_1")
_OURS = ("pair_id", "reward_margin", "source", "confidence", "schema_version")
_GIVEN = (
    "are_different", "best_image_uid", "caption", "has_label", "pair_id", "reward_margin", "source", "confidence",
    "schema_version", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "image_0_uid", "image_1_uid",
)  # fmt: skip
Row = tuple[Any, ...]
SCHEMA = pa.schema([*list(EXPORT_SCHEMA)[:19], *(EXPORT_SCHEMA.field(name) for name in _OURS)])
"""The 19 columns of Pick-a-Pic v2 in its order, then ours."""


class Shard:
    """One Parquet file in the making; nothing of it is visible until it was closed.

    Args:
        folder: Where it goes.
        number: Its place among the shards.
        behind: Does the writing; an error of it is raised by a later call, as a StoreError.
    """

    def __init__(self, folder: Path, number: int, behind: Behind) -> None:
        self.path = folder / f"pairs-{number:05d}.parquet"
        self.pairs = 0
        self.bytes = 0
        self.sha256 = ""
        self._behind = behind
        self._temporary = self.path.with_name(self.path.name + TEMPORARY)
        self._rows: list[Row] = []
        self._group_bytes = 0
        self._file: pa.OSFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, pair: OfflinePair) -> None:
        """Take in a pair; a full row group goes to the disk while the next one fills."""
        self._rows.append(_row(pair))
        size = len(pair.winner_jpg) + len(pair.loser_jpg)
        self.pairs, self.bytes, self._group_bytes = (
            self.pairs + 1,
            self.bytes + size,
            self._group_bytes + size,
        )
        if len(self._rows) >= _GROUP_PAIRS or self._group_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self, state: Mapping[str, object]) -> None:
        """Have it written to its end, with `state` in its metadata, and made visible; `sha256` is known when
        the writing is done."""
        self._flush()
        self._behind.do(partial(self._close, json.dumps(state).encode()))

    def discard(self) -> None:
        """Give up: what was written is removed, unless it has become visible. Not to be called while
        something is being written."""
        for stream in (self._writer, self._file):
            if stream is not None:
                with suppress(OSError, pa.ArrowException):
                    stream.close()
        if self._writer is not None:
            self._writer.is_open = (
                False  # else it would try once more when it is collected, and print that it cannot
            )
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        rows, self._rows, self._group_bytes = self._rows, [], 0
        self._behind.do(partial(self._write, rows))

    def _write(self, rows: Sequence[Row]) -> None:
        with _refusal(self.path):
            if self._writer is None:
                self._open()
            if rows:
                self._writer.write_table(_table(rows))

    def _open(self) -> None:
        # Arrow's own file: it is written to without the interpreter, which reads and verifies meanwhile
        self._file = pa.OSFile(str(self._temporary), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            SCHEMA,
            # pictures are compressed already, and each differs from the others
            compression={name: "none" if name in _PICTURES else "zstd" for name in SCHEMA.names},
            use_dictionary=[name for name in SCHEMA.names if name not in _PICTURES],
            write_statistics=False,
            write_page_checksum=True,
        )

    def _close(self, state: bytes) -> None:
        with _refusal(self.path):
            self._writer.add_key_value_metadata({STATE: state})
            self._writer.close()
            self._file.close()
            self.sha256 = sha256_of(self._temporary)
        with whole_file(self.path) as temporary:
            assert temporary == self._temporary


@contextmanager
def _refusal(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one clear error."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not write {path}: {error.strerror or error}. Whole shards are kept: free space and "
            f"repeat the import."
        ) from error


def _table(rows: Sequence[Row]) -> pa.Table:
    given = dict(zip(_GIVEN, zip(*rows, strict=True), strict=True))
    columns = [
        pa.array(given[field.name], field.type) if field.name in given else pa.nulls(len(rows), field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _row(pair: OfflinePair) -> Row:
    """The values of `_GIVEN`."""
    # a winner that always stood first would teach a reader of the file the position
    winner = keyed_choice(2, "import", pair.row)
    pictures = (pair.loser_jpg, pair.winner_jpg)
    models = (pair.loser_model, pair.winner_model)
    uids = (pair.loser_uid, pair.winner_uid)
    first, second = (0, 1) if winner else (1, 0)
    return (
        True, pair.winner_uid, pair.caption, True, pair.row, pair.margin, "offline", pair.confidence, SCHEMA_VERSION,
        pictures[first], pictures[second], float(first), float(second), models[first], models[second], uids[first], uids[second],
    )  # fmt: skip
