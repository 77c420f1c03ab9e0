"""The rows of the store: `Sample` and `Pair`, their Parquet schemas, and what a row must hold to enter.

A *view* is a dataclass of some fields of a row; reading rows as views reads only those columns.
Rows are checked in Python before Arrow sees them, so that an error names the row, the column and the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import pyarrow as pa

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import StoreError

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image; its latents are in `latent_file`. docs/data.md says what each column means.

    `iteration`, `unit` and `latent_file` may be left out of a row that is to be stored: the store sets them.
    What is None by default is not known of every image: an imported one was not drawn by an agent's batch.
    """

    sample_id: str
    iteration: int = -1
    unit: int = -1
    group: int | None = None
    prompt_id: str
    prompt: str
    negative_prompt: str | None = None
    agent: str
    weights: str | None = None
    seed_key: str | None = None
    batch_size: int | None = None
    batch_position: int | None = None
    sampler: str | None = None
    rewards: Mapping[str, float] | None = None
    latent_file: str = ""
    model: str | None = None
    source: str
    improved_from: str | None = None
    height: int | None = None
    width: int | None = None

    @property
    def scores(self) -> Mapping[str, float]:
        """`rewards`; empty if the image was never scored."""
        return self.rewards or {}

    @property
    def place(self) -> tuple[int, int]:
        """(size of the batch that it was drawn in, its position there); (1, 0) if it was not drawn."""
        return self.batch_size or 1, self.batch_position or 0

    @property
    def noise_key(self) -> list[str | int]:
        """`seed_key` parsed: the name of the image's noise; empty if it was not drawn."""
        return parse_json(self.seed_key or "[]")

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """`sampler` parsed; empty if the image was not drawn."""
        return parse_json(self.sampler or "{}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One preference between two samples. docs/data.md says what each column means.

    `iteration` may be left out of a row that is to be stored: the store sets it.
    """

    pair_id: str
    iteration: int = -1
    prompt_id: str
    prompt: str
    winner_id: str
    loser_id: str
    judge: str
    margin: float | None = None
    source: str
    winner_agent: str | None = None
    loser_agent: str | None = None
    explored_id: str | None = None
    main_id: str | None = None
    uncertainty_winner: float | None = None
    uncertainty_loser: float | None = None
    votes: int | None = None
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A view of `Pair`: which of two images of a prompt won."""

    prompt_id: str
    prompt: str
    winner_id: str
    loser_id: str


@dataclass(frozen=True, slots=True)
class MarginOfPair:
    """A view of `Pair`: by how much its winner won."""

    pair_id: str
    margin: float | None


@dataclass(frozen=True, slots=True)
class ImageSize:
    """A view of `Sample`: the size of its image in pixels."""

    sample_id: str
    height: int | None
    width: int | None


_ARROW_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    Mapping[str, float]: pa.map_(pa.string(), pa.float64()),
}


def schema_of(kind: type) -> pa.Schema:
    """The Parquet schema of a row type: one column a field, nullable where the field may be None."""
    columns = []
    for name, hint in get_type_hints(kind).items():
        is_nullable = NoneType in get_args(hint)
        plain = get_args(hint)[0] if is_nullable else hint
        columns.append(pa.field(name, _ARROW_TYPES[plain], nullable=is_nullable))
    return pa.schema(columns)


def column_names(kind: type) -> list[str]:
    """The columns that a row type or a view is made of."""
    return [field.name for field in fields(kind)]


KINDS: dict[str, type] = {"samples": Sample, "pairs": Pair}
"""Row type by kind of shard."""

SCHEMAS = {name: schema_of(kind) for name, kind in KINDS.items()}
"""Schema by kind of shard."""

LATER_COLUMNS = frozenset({"improved_from", "height", "width", "votes", "agreement"})
"""Columns that stores of earlier versions lack; they read as null."""

_JSON_COLUMNS = frozenset({"seed_key", "sampler"})
_LEFT_OUT = (-1, "")  # the defaults of the columns that the store sets
_EXPECTED = {
    "string": "a string",
    "int64": "an integer",
    "double": "a number",
    "map<string, double>": "names mapped to numbers",
}


def to_table(rows: Sequence[object], kind: str, filled: Mapping[str, object]) -> pa.Table:
    """Checked rows of a kind ("samples" or "pairs") as an Arrow table, columns in schema order; a row that
    states another value than the one that the store itself sets (`filled`) is refused."""
    schema = SCHEMAS[kind]
    key = schema.names[0]
    checked: dict[object, dict[str, object]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, KINDS[kind]):
            raise StoreError(
                f"row {number} is {row!r:.80} ({type(row).__name__}); {kind} are rows of "
                f"diffexpo.data.{KINDS[kind].__name__}"
            )
        label = f"row {number} ({key} {getattr(row, key)!r})"
        values = {field.name: _check(getattr(row, field.name), field, filled, label) for field in schema}
        if values[key] in checked:
            raise StoreError(f"{label}: {key} occurs twice in one shard; ids are unique")
        checked[values[key]] = values
    return pa.Table.from_pylist(list(checked.values()), schema=schema)


def to_rows(table: pa.Table, kind: type[Row]) -> list[Row]:
    """The rows of a table whose columns are the fields of `kind`, a row type or a view; maps become dicts."""
    # Column by column into empty rows: twenty arguments a constructor would cost as much as the reading.
    rows = [object.__new__(kind) for _ in range(table.num_rows)]
    for name, column in zip(table.column_names, table.columns, strict=True):
        for row, value in zip(rows, column.to_pylist(maps_as_pydicts="strict"), strict=True):
            object.__setattr__(row, name, value)
    return rows


def _check(value: object, field: pa.Field, filled: Mapping[str, object], label: str) -> object:
    if field.name in filled:
        if value not in _LEFT_OUT and value != filled[field.name]:
            raise StoreError(
                f"{label}: column {field.name!r} is {value!r} in a shard of {filled[field.name]!r}"
            )
        return filled[field.name]
    if value is None and field.nullable:
        return None
    kind, is_bool = str(field.type), isinstance(value, bool)
    if kind == "string" and isinstance(value, str) and is_utf8(value):
        return _check_json(value, field.name, label) if field.name in _JSON_COLUMNS else value
    if kind == "int64" and isinstance(value, Integral) and not is_bool and -(2**63) <= int(value) < 2**63:
        return int(value)
    if kind == "double" and isinstance(value, Real) and not is_bool:
        return float(value)
    if kind.startswith("map") and isinstance(value, Mapping):
        return [_check_entry(name, number, label) for name, number in value.items()]
    found = "missing" if value is None else f"{value!r} ({type(value).__name__})"
    raise StoreError(f"{label}: column {field.name!r} is {found}; it must hold {_EXPECTED[kind]}")


def _check_entry(name: object, number: object, label: str) -> tuple[str, float]:
    if isinstance(name, str) and isinstance(number, Real) and not isinstance(number, bool):
        return name, float(number)
    raise StoreError(
        f"{label}: column 'rewards' maps {name!r} to {number!r}; it must map names to numbers (NaN: failed)"
    )


def _check_json(text: str, name: str, label: str) -> str:
    try:
        parse_json(text)
    except ValueError as error:
        raise StoreError(f"{label}: column {name!r} is {text!r}; it must hold JSON ({error})") from error
    return text


def is_utf8(text: str) -> bool:
    """Whether a text can be written; a lone surrogate, as which bytes that are not UTF-8 are read, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def table_of(records: Sequence[Mapping[str, object]]) -> pa.Table:
    """Mappings as an Arrow table with a column for every name; what a record does not have is null."""
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: pa.array([record.get(name) for record in records]) for name in names})
