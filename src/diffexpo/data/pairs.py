"""Which pairs an iteration learns from, and the batch of any step (see `draws`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import HybridConfig
from diffexpo.data.columns import Columns
from diffexpo.data.draws import Collected, CollectedRef, Draws, Index, Loader, hybrid_weights
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.data.rows import column_names
from diffexpo.data.sharing import UnreadRows
from diffexpo.data.store import Store
from diffexpo.errors import DataError, StoreError
from diffexpo.types import Conditioning, PairBatch


@dataclass(frozen=True, slots=True)
class PairRef(CollectedRef):
    """What training reads of a stored pair before its latents: a view of `Pair`."""

    pair_id: str
    winner_id: str
    loser_id: str
    uncertainty_winner: float | None = None
    uncertainty_loser: float | None = None


@dataclass(frozen=True, slots=True)
class ContrastRef(CollectedRef):
    """What is read of a pair that has a contrast couple: a view of `Pair`."""

    pair_id: str
    explored_id: str
    main_id: str


@dataclass(frozen=True)
class PairIndex(Index[PairRef]):
    """Pairs to learn from with their sampling weights, all positive."""

    refs: Columns[PairRef]

    def prompts(self) -> list[str]:
        """Distinct prompts, in order."""
        return self.refs.distinct("prompt")

    def by_source(self) -> str:
        """How many pairs come from where, e.g. "4 offline, 8 online"."""
        return ", ".join(f"{count} {source}" for source, count in sorted(self.refs.counts("source").items()))

    @property
    def newest(self) -> int | None:
        """The newest collection that pairs come from; None where all are offline."""
        collected = self.refs.numbers("iteration")[~self.refs.equals("source", "offline")]
        return int(collected.max()) if len(collected) else None


def pair_index(store: Store, hybrid: HybridConfig, iteration: int) -> PairIndex:
    """Pairs that iteration t trains on: D_off and D_1 .. D_{t-1}, with the weights of `hybrid_weights`.

    Later collections are not read, whatever the store holds. The result has pairs of positive weight, in the
    store's order. A DataError is raised when no pair is left.
    """
    refs = _columns(store, PairRef, 0, iteration)
    every = PairIndex(refs, np.ones(len(refs)))
    is_offline = refs.equals("source", "offline")
    weights = hybrid_weights(hybrid, refs.numbers("iteration"), is_offline, every.newest)
    kept = np.flatnonzero(weights > 0)
    if len(kept) == 0:
        raise DataError(
            f"iteration {iteration} has no pairs to train on ({len(refs)} in the store, none of positive "
            "weight): set offline.source, or check why pairing kept nothing (pairs/dropped_ties, "
            "pairing.min_margin)"
        )
    if len(kept) == len(refs):
        return PairIndex(refs, weights)
    return PairIndex(refs.take(kept), weights[kept])


def contrast_refs(store: Store, index: PairIndex) -> Columns[ContrastRef]:
    """The newest collection's pairs that have a contrast couple; none where all pairs are offline."""
    newest = index.newest
    if newest is None:
        return _columns(store, ContrastRef, 0, 0)
    refs = _columns(store, ContrastRef, newest, newest + 1)
    has_couple = refs.is_given("explored_id") & refs.is_given("main_id")
    return refs.take(np.flatnonzero(has_couple & ~refs.equals("source", "offline")))


def _columns(store: Store, view: type[Collected], since: int, before: int) -> Columns[Collected]:
    table = store.table("pairs", column_names(view), since, before, encoded=("source", "prompt"))
    return Columns(table, view)


RowsOf = Callable[[list[str], list[str], list[str]], tuple[Any, Any, Any]]
"""Sample ids of both sides and texts to latents of both sides and conditioning, read or not."""


@dataclass(eq=False)
class PairLoader(Loader):
    """Batches of pairs.

    Args:
        index: Pairs and weights, from `pair_index`.
        contrast_per_batch: Contrast pairs per step, drawn from the newest collection's pairs that have one;
            0 is none. With no such pairs (the first iteration) batches carry none.
        sizes: Image sizes by sample id, where there are several (`Store.sizes`).
    """

    store: Store
    index: PairIndex
    embeddings: PromptEmbeddings
    _: KW_ONLY
    contrast_per_batch: int = 0
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refs = self.index.refs
        self.size = len(refs)
        # winner and loser have one size, explored and main too
        self.draws = Draws(
            refs,
            self.index.weights,
            self.name(),
            self.batch_size,
            sizes=self.sizes,
            sample_id=lambda ref: ref.winner_id,
        )
        couples = contrast_refs(self.store, self.index) if self.contrast_per_batch else []
        self.contrast_per_batch *= bool(couples)
        self._contrast: Draws[ContrastRef] = Draws(
            couples,
            None,
            self.name("contrast"),
            self.contrast_per_batch,
            sizes=self.sizes,
            sample_id=lambda ref: ref.explored_id,
        )
        self._has_uncertainty = refs.has("uncertainty_winner") or refs.has("uncertainty_loser")

    def describe(self) -> str:
        """One line for a person: how many pairs from where."""
        length = self.draws.epochs.length
        per_epoch = "" if length == self.size else f"; {length} an epoch by weight"
        return f"{self.size} pairs ({self.index.by_source()}{per_epoch})"

    def row_names(self) -> list[str]:
        return self.index.refs.texts("pair_id")

    def row_weights(self) -> np.ndarray:
        return self.index.weights

    def batch(self, step: int) -> PairBatch:
        """The batch of a step (from 0); reads only its latents."""
        return self._batch(step, self._read_rows)

    def unread_batch(self, step: int) -> PairBatch:
        """The batch of a step, which is read as it is cut; of several image sizes it is read at once."""
        return self._batch(step, self._read_rows if self.sizes else self._leave_rows)

    def _batch(self, step: int, rows_of: RowsOf) -> PairBatch:
        drawn, contrast = self.draws.batch(step), self._contrast.batch(step)
        refs = [row.ref for row in drawn]
        texts = [ref.prompt for ref in refs]
        winner, loser, conditioning = rows_of(
            [ref.winner_id for ref in refs], [ref.loser_id for ref in refs], texts
        )
        batch = PairBatch(
            winner=winner,
            loser=loser,
            conditioning=conditioning,
            keys=tuple(f"{row.ref.pair_id}@{row.epoch}" for row in drawn),
        )
        if self._has_uncertainty:
            batch = replace(
                batch,
                uncertainty_winner=torch.tensor([ref.uncertainty_winner or 0.0 for ref in refs]),
                uncertainty_loser=torch.tensor([ref.uncertainty_loser or 0.0 for ref in refs]),
            )
        if not contrast:
            return batch
        couples = [row.ref for row in contrast]
        explored, main, conditioning = rows_of(
            [ref.explored_id for ref in couples],
            [ref.main_id for ref in couples],
            [ref.prompt for ref in couples],
        )
        return replace(
            batch,
            explored=explored,
            main=main,
            contrast_conditioning=conditioning,
            contrast_keys=tuple(f"{row.ref.pair_id}@contrast{row.epoch}" for row in contrast),
        )

    def _read_rows(self, ids: list[str], others: list[str], texts: list[str]) -> tuple[Any, Any, Any]:
        return *self._read(ids, others), self.embeddings.select(texts)

    def _leave_rows(self, ids: list[str], others: list[str], texts: list[str]) -> tuple[Any, Any, Any]:
        @lru_cache(maxsize=1)
        def sides(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return self._read(ids[start:stop], others[start:stop])

        def conditioning(start: int, stop: int) -> Conditioning:
            return self.embeddings.select(texts[start:stop])

        count = len(ids)
        winner = UnreadRows(count, lambda start, stop: sides(start, stop)[0])
        loser = UnreadRows(count, lambda start, stop: sides(start, stop)[1])
        return winner, loser, UnreadRows(count, conditioning)

    def _read(self, ids: list[str], others: list[str]) -> tuple[Tensor, Tensor]:
        """Latents of both sides of pairs; they are compared at one noise, so shape and type must agree."""
        sides = [self.store.stretches(names) for names in (ids, others)]
        kinds = [[(part.shape, part.dtype) for part in side] for side in sides]
        if kinds[0] != kinds[1]:
            raise StoreError(
                f"the latents of {ids[0]!r} and other samples differ in shape or type from those of "
                f"{others[0]!r} and others, which they are paired with; a store belongs to one model: import "
                "or collect into a new run"
            )
        return stacked(sides[0]), stacked(sides[1])
