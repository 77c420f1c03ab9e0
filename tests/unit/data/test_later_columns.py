"""A store of an earlier version lacks later columns; it reads with nulls there, and can grow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.data.rows import LATER_COLUMNS
from diffexpo.data.store import Store
from diffexpo.errors import StoreError
from tests.rows import sample_row


@dataclass(frozen=True)
class Origin:
    improved_from: str | None
    sample_id: str


def test_rows_without_a_later_column_read_as_null_beside_rows_with_it(tmp_path):
    store = Store(tmp_path)
    name = store.append_unit(1, 0, 0, [sample_row("a"), sample_row("b")], np.zeros((2, 1, 2, 2), np.float32))
    table = pq.read_table(tmp_path / name)
    old = table.drop_columns(sorted(LATER_COLUMNS & set(table.column_names)))
    pq.write_table(old.replace_schema_metadata(table.schema.metadata), tmp_path / name)
    store = Store(tmp_path)
    store.write_manifest("collect", 1, {})
    assert store.verify() == 2
    improved = [sample_row("c", improved_from="a")]
    store.append_unit(1, 0, 0, improved, np.zeros((1, 1, 2, 2), np.float32), stage="improve")
    store.write_manifest("improve", 1, {})
    rows = {row.sample_id: row for row in Store(tmp_path).samples(1)}
    assert {name: row.improved_from for name, row in rows.items()} == {"a": None, "b": None, "c": "a"}
    assert store.samples(1, view=Origin) == [Origin(None, "a"), Origin(None, "b"), Origin("a", "c")]
    assert store.sample("b").improved_from is None


def test_a_column_that_was_always_there_is_still_demanded(tmp_path):
    store = Store(tmp_path)
    name = store.append_unit(1, 0, 0, [sample_row("a")], np.zeros((1, 1, 2, 2), np.float32))
    table = pq.read_table(tmp_path / name)
    pq.write_table(pa.table(table.drop_columns(["rewards"])), tmp_path / name)
    with pytest.raises(StoreError, match="missing: rewards"):
        Store(tmp_path).sample("a")
