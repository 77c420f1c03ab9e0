"""Rows of a view that stay in Arrow columns: a million cost what their values do, and a row is made when it
is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

View = TypeVar("View")


class Columns(Sequence[View], Generic[View]):
    """A table as a sequence of rows.

    Args:
        table: Its columns are fields of the view. One without a single value is left out.
        view: A dataclass, whose fields without a column have their default; or `dict`.
    """

    def __init__(self, table: pa.Table, view: type[View]) -> None:
        self._view = view
        empty = [name for name in table.column_names if table.num_rows == table[name].null_count > 0]
        self.table = table = table.drop_columns(empty)
        self._columns = {name: table[name] for name in table.column_names}

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> View: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[View]: ...
    def __getitem__(self, place: int | slice) -> View | Sequence[View]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return self._view(**{name: column[int(place)].as_py() for name, column in self._columns.items()})

    def texts(self, name: str) -> list[str]:
        """A column of texts without nulls, N of them."""
        return self.table[name].to_pylist()

    def distinct(self, name: str) -> list[str]:
        """Values of a column, each once, in the order in which they first appear."""
        return [str(value) for value in pc.unique(self.table[name].combine_chunks()).to_pylist()]

    def counts(self, name: str) -> dict[str, int]:
        """How many rows have each value of a column, by value as text, in the order of first appearance."""
        if not self.has(name):
            return {"None": len(self)} if len(self) else {}
        found = pc.value_counts(self.table[name].combine_chunks())
        return {str(entry["values"]): int(entry["counts"]) for entry in found.to_pylist()}

    def take(self, places: np.ndarray) -> Columns[View]:
        """The rows at places (M,)."""
        return Columns(self.table.take(places), self._view)

    def is_given(self, name: str) -> np.ndarray:
        """Where a column has a value, (N,)."""
        return self.table[name].is_valid().to_numpy() if self.has(name) else np.zeros(len(self), bool)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers without nulls (N,)."""
        return self.table[name].to_numpy()

    def equals(self, name: str, value: str) -> np.ndarray:
        """Where a column of texts has a value, (N,)."""
        return pc.equal(self.table[name].cast(pa.string()), value).to_numpy()

    def has(self, name: str) -> bool:
        """Whether any row has a value in a column."""
        return name in self._columns
