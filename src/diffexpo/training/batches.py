"""Split one global batch into shares of processes and micro-batches, without changing its mean.

Nothing here knows what a batch means. A batch is a frozen dataclass whose fields are tensors, conditionings
and tuples with one row for each of `keys`, or None; a field marked with `ROWS_OF` has one row for each name
in another field (the contrast pairs of a batch of pairs). Numbers and flags go with every part; rows that are
not read yet (`UnreadRows`) are read when a part is cut. Rows of several shapes (`MixedRows`) are cut so that
each micro-batch has one shape: factors count rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffexpo.data.sharing import UnreadRows
from diffexpo.types import ROWS_OF, STAYS, Batch, Conditioning, MixedRows

AnyBatch = TypeVar("AnyBatch", bound=Batch)


def split_batch(batch: AnyBatch, start: int, stop: int) -> AnyBatch:
    """Rows start..stop-1 of a batch, 0 <= start <= stop <= B, with the proportional slice of its contrast
    pairs. Views, no copies; split_batch(b, 0, len(b)) equals b.

    A batch of B pairs and E contrast pairs gives the part those from floor(start E / B) to floor(stop E / B),
    so that adjoining parts together hold every contrast pair once; the part has none if that slice is empty.
    """
    assert 0 <= start <= stop <= len(batch)
    total = max(1, len(batch))
    changes: dict[str, Any] = {}
    for entry in fields(batch):
        value, names = getattr(batch, entry.name), entry.metadata.get(ROWS_OF)
        if names is None:
            changes[entry.name] = _rows(value, slice(start, stop))
            continue
        extra = len(getattr(batch, names))
        part = slice(start * extra // total, stop * extra // total)
        is_empty = part.start == part.stop
        changes[entry.name] = None if is_empty and entry.name != names else _rows(value, part)
    return replace(batch, **changes)


def micro_batches(batch: AnyBatch, size: int, rank: int = 0, world: int = 1) -> list[tuple[AnyBatch, float]]:
    """One process's micro-batches, each with the factor of its mean loss in the global mean loss.

    sum over all processes and micro-batches of factor * loss(micro-batch) = loss(batch), if loss is the mean
    of weight * (loss of a row) plus the mean of a term over contrast pairs. Where a micro-batch's share of
    the contrast pairs is not its share of the pairs, the factor is the former and `weight` makes up for it;
    without contrast pairs the factors are rows / B and sum to 1 over all processes.

    Groups that must stay whole (`ScoredBatch.is_grouped`) are not cut, so that one of more than `size` rows
    stands alone; where another shape begins, a cut is made. Process `rank` of `world` takes the rows from
    rank B / world up to (rank + 1) B / world, or up to the nearest borders of groups.
    """
    return list(each_micro_batch(batch, size, rank, world))


def each_micro_batch(
    batch: AnyBatch, size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[AnyBatch, float]]:
    """`micro_batches` one after another, of which each is read (`UnreadRows`) when it is asked for."""
    total = len(batch)
    borders, cuts = group_borders(batch), shape_borders(batch)
    first, last = (_border_before(borders, place) for place in process_share(total, rank, world))
    start = first
    while start < last:
        stop = _border_before(borders, min(start + size, last))
        if stop <= start:
            stop = next(border for border in borders if border > start)
        stop = min([stop, *(cut for cut in cuts if cut > start)])
        yield _weighted(batch, split_batch(batch, start, stop))
        start = stop


def shape_borders(batch: Batch) -> list[int]:
    """Rows at which a batch must be cut because another shape begins, there or among its contrast pairs."""
    total = len(batch)
    cuts: set[int] = set()
    for entry in fields(batch):
        value, names = getattr(batch, entry.name), entry.metadata.get(ROWS_OF)
        if isinstance(value, MixedRows):
            extra = total if names is None else len(value)
            # The first row whose slice of the contrast pairs (see `split_batch`) begins at the border.
            cuts |= {-(-border * total // extra) for border in value.borders}
    return sorted(cuts)


def _weighted(batch: AnyBatch, part: AnyBatch) -> tuple[AnyBatch, float]:
    """The part with its factor, and with weights that make up for an uneven share of contrast pairs."""
    total, extra = len(batch), len(getattr(batch, "contrast_keys", ()))
    share = len(getattr(part, "contrast_keys", ()))
    if not share or share * total == len(part) * extra:
        return part, len(part) / total
    weight = torch.ones(len(part), device=device_of(part)) if part.weight is None else part.weight
    return replace(part, weight=weight * (len(part) * extra / (total * share))), share / extra


def group_borders(batch: Batch) -> Sequence[int]:
    """Where a batch may be cut, 0 and B included. Rows of a group are consecutive."""
    groups: Tensor | None = getattr(batch, "groups", None)
    if groups is None or not getattr(batch, "is_grouped", False):
        return range(len(batch) + 1)
    changes = (groups[1:] != groups[:-1]).nonzero().flatten() + 1
    return [0, *changes.tolist(), len(batch)]


def _border_before(borders: Sequence[int], place: int) -> int:
    return borders[bisect_right(borders, place) - 1]


def process_share(total: int, rank: int, world: int) -> tuple[int, int]:
    """Contiguous share of `total` items: (first, one past the last). process_share(5, 1, 2) is (2, 5)."""
    return rank * total // world, (rank + 1) * total // world


def move_batch(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """The batch on a device, but for what stays in main memory (`STAYS`); the same object if it is there
    already."""
    if device_of(batch) == device:
        return batch
    moved: dict[str, Any] = {
        entry.name: value.to(device)
        for entry in fields(batch)
        if isinstance(value := getattr(batch, entry.name), (Tensor, Conditioning))
        and STAYS not in entry.metadata
    }
    return replace(batch, **moved)


def device_of(batch: Batch) -> torch.device:
    """Where a batch's first tensor is, of those that move."""
    return next(
        value.device
        for entry in fields(batch)
        if isinstance(value := getattr(batch, entry.name), (Tensor, MixedRows))
        and STAYS not in entry.metadata
    )


def _rows(value: Any, part: slice) -> Any:
    if isinstance(value, Conditioning):
        return value.select(part)
    return value[part] if isinstance(value, (Tensor, MixedRows, UnreadRows, tuple)) else value
