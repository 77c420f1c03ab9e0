"""Work that processes share: who they are, and rows of a batch that each reads for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diffexpo.types import Batch


class Processes(Protocol):
    """The processes of a run, of which this is number `rank` of `size`. All call every method."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def barrier(self) -> None:
        """Wait for all."""
        ...

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The concatenation of every process's list of JSON values, in rank order, on all."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The items."""
        return items


@dataclass(frozen=True)
class UnreadRows:
    """Rows of a batch that are read when a slice of them is asked for: a process reads its own only."""

    count: int
    read: Callable[[int, int], Any]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> Any:
        """Rows start..stop-1 as a tensor or conditioning."""
        start, stop, _ = rows.indices(self.count)
        return self.read(start, stop)


@runtime_checkable
class ReadsRows(Protocol):
    """A loader whose batches can be cut before they are read."""

    def unread_batch(self, step: int) -> Batch:
        """The batch of a step, whose large fields are `UnreadRows`."""
        ...
