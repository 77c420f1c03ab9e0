"""The store's two tables: their columns, and what a row must look like to enter.

Rows are checked in Python before Arrow sees them, so that an error names the row, the column and the value.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import pyarrow as pa

from diffexpo.errors import StoreError

Row = dict[str, object]

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("iteration", pa.int64(), nullable=False),
        pa.field("unit", pa.int64(), nullable=False),
        pa.field("group", pa.int64()),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string()),
        pa.field("agent", pa.string(), nullable=False),
        pa.field("weights", pa.string()),
        pa.field("seed_key", pa.string()),
        pa.field("batch_size", pa.int64()),
        pa.field("batch_position", pa.int64()),
        pa.field("sampler", pa.string()),
        pa.field("rewards", pa.map_(pa.string(), pa.float64())),
        pa.field("latent_file", pa.string(), nullable=False),
        pa.field("model", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("improved_from", pa.string()),
        pa.field("height", pa.int64()),
        pa.field("width", pa.int64()),
    ]
)
"""One row an image. docs/data.md says what each column means."""

LATER_COLUMNS = frozenset({"improved_from", "height", "width"})
"""Columns that stores of earlier versions lack; they read as null."""

PAIR_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("iteration", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("winner_id", pa.string(), nullable=False),
        pa.field("loser_id", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("margin", pa.float64()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("winner_agent", pa.string()),
        pa.field("loser_agent", pa.string()),
        pa.field("explored_id", pa.string()),
        pa.field("main_id", pa.string()),
        pa.field("uncertainty_winner", pa.float64()),
        pa.field("uncertainty_loser", pa.float64()),
    ]
)
"""One row a preference. docs/data.md says what each column means."""

SCHEMAS = {"samples": SAMPLE_SCHEMA, "pairs": PAIR_SCHEMA}
"""Schema by kind of shard."""

JSON_COLUMNS = frozenset({"seed_key", "sampler"})
_EXPECTED = {
    "string": "a string",
    "int64": "an integer",
    "double": "a number",
    "map<string, double>": "names mapped to numbers",
}


def to_table(
    rows: Sequence[Mapping[str, object]], schema: pa.Schema, filled: Mapping[str, object]
) -> pa.Table:
    """Checked rows as an Arrow table.

    Args:
        rows: Rows by column name; absent nullable columns become null.
        schema: `SAMPLE_SCHEMA` or `PAIR_SCHEMA`.
        filled: Values the store itself sets; a row that states another one is refused.
    Returns:
        The table, columns in schema order.
    Raises:
        StoreError: names the row, the column and the value.
    """
    key = schema.names[0]
    checked: list[Row] = []
    seen: set[object] = set()
    for number, row in enumerate(rows):
        label = f"row {number} ({key} {row.get(key)!r})"
        _refuse_unknown(row, schema, label)
        values = {field.name: _check(row, field, filled, label) for field in schema}
        if values[key] in seen:
            raise StoreError(f"{label}: {key} occurs twice in one shard; ids are unique")
        seen.add(values[key])
        checked.append(values)
    return pa.Table.from_pylist(checked, schema=schema)


def to_rows(table: pa.Table) -> list[Row]:
    """The rows of a table as dicts; maps become dicts."""
    return table.to_pylist(maps_as_pydicts="strict")


def _refuse_unknown(row: Mapping[str, object], schema: pa.Schema, label: str) -> None:
    for name in row:
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, 1)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise StoreError(
                f"{label}: there is no column {name!r} in the store{hint}. Columns: "
                f"{', '.join(schema.names)}."
            )


def _check(row: Mapping[str, object], field: pa.Field, filled: Mapping[str, object], label: str) -> object:
    value = row.get(field.name)
    if field.name in filled:
        if value is not None and value != filled[field.name]:
            raise StoreError(
                f"{label}: column {field.name!r} is {value!r} in a shard of {filled[field.name]!r}"
            )
        return filled[field.name]
    if value is None:
        if field.nullable:
            return None
        raise StoreError(
            f"{label}: column {field.name!r} is missing; it must hold {_EXPECTED[str(field.type)]}"
        )
    if field.name in JSON_COLUMNS:
        return _check_json(value, field.name, label)
    kind = str(field.type)
    if kind == "string" and isinstance(value, str) and _is_unicode(value):
        return value
    if (
        kind == "int64"
        and isinstance(value, Integral)
        and not isinstance(value, bool)
        and -(2**63) <= value < 2**63
    ):
        return int(value)
    if kind == "double" and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind.startswith("map") and isinstance(value, Mapping):
        return [_check_entry(name, number, label) for name, number in value.items()]
    raise StoreError(
        f"{label}: column {field.name!r} is {value!r} ({type(value).__name__}); it must hold "
        f"{_EXPECTED[kind]}"
    )


def _check_entry(name: object, number: object, label: str) -> tuple[str, float]:
    if isinstance(name, str) and isinstance(number, Real) and not isinstance(number, bool):
        return name, float(number)
    raise StoreError(
        f"{label}: column 'rewards' maps {name!r} to {number!r}; it must map names to numbers (NaN: failed)"
    )


def _check_json(value: object, name: str, label: str) -> str:
    try:
        if isinstance(value, str):
            json.loads(value)
            return value
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{label}: column {name!r} is {value!r}; it must hold JSON ({error})") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no file format can hold it
        return False
    return True
