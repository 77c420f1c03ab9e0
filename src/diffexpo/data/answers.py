"""People's answers as a Parquet file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.files import write_bytes

ANSWERS_SCHEMA = pa.schema(
    [
        ("rater", pa.int64()),
        ("question", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("answer", pa.string()),
        ("a_is_left", pa.bool_()),
        ("kind", pa.string()),
        ("place", pa.int64()),
        ("seconds", pa.float64()),
        ("is_left_out", pa.bool_()),
    ]
)
"""One row an answer, as `diffexpo.labelling.export.COLUMNS` describes it."""


def write_answers(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write answers; the file appears when it is whole."""
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([dict(row) for row in rows], ANSWERS_SCHEMA), buffer, compression="zstd"
    )
    write_bytes(path, buffer.getvalue())
