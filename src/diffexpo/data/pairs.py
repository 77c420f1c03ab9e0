"""Which pairs an iteration learns from, and the batch of any step (see `draws`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import HybridConfig
from diffexpo.data.draws import CollectedRef, Drawn, Draws, Index, Loader, hybrid_weights
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.data.store import Store
from diffexpo.errors import DataError, StoreError
from diffexpo.types import PairBatch


@dataclass(frozen=True, slots=True)
class PairRef(CollectedRef):
    """What training reads of a stored pair before its latents: a view of `Pair`."""

    pair_id: str
    winner_id: str
    loser_id: str
    explored_id: str | None = None
    main_id: str | None = None
    uncertainty_winner: float | None = None
    uncertainty_loser: float | None = None


PairIndex = Index[PairRef]


def pair_index(store: Store, hybrid: HybridConfig, iteration: int) -> PairIndex:
    """Pairs that iteration t trains on: D_off and D_1 .. D_{t-1}, with the weights of `hybrid_weights`.

    Later collections are not read, whatever the store holds. The result has pairs of positive weight, in the
    store's order. A DataError is raised when no pair is left.
    """
    refs = [ref for ref in store.pairs(view=PairRef) if ref.iteration < iteration]
    weights = hybrid_weights(hybrid, refs, _newest(refs))
    kept = np.flatnonzero(weights > 0)
    if len(kept) == 0:
        raise DataError(
            f"iteration {iteration} has no pairs to train on ({len(refs)} in the store, none of positive "
            "weight): set offline.source, or check why pairing kept nothing (pairs/dropped_ties, "
            "pairing.min_margin)"
        )
    return PairIndex(tuple(refs[i] for i in kept), weights[kept])


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
        refs, newest = self.index.refs, _newest(self.index.refs)
        couples = [ref for ref in refs if ref.explored_id is not None and ref.main_id is not None]
        candidates = [ref for ref in couples if ref.source != "offline" and ref.iteration == newest]
        self.size = len(refs)
        self.draws = self._draws(refs, self.index.weights, "batch", self.batch_size)
        self.contrast_per_batch *= bool(candidates)
        self._contrast = self._draws(candidates, None, "contrast", self.contrast_per_batch)
        self._has_uncertainty = any(
            ref.uncertainty_winner is not None or ref.uncertainty_loser is not None for ref in refs
        )

    def describe(self) -> str:
        """One line for a person: how many pairs from where."""
        length = self.draws.epochs.length
        per_epoch = "" if length == self.size else f"; {length} an epoch by weight"
        return f"{self.size} pairs ({self.index.by_source()}{per_epoch})"

    def batch(self, step: int) -> PairBatch:
        """The batch of a step (from 0); reads only its latents."""
        drawn, contrast = self.draws.batch(step), self._contrast.batch(step)
        refs = [row.ref for row in drawn]
        winner, loser = self._read([ref.winner_id for ref in refs], [ref.loser_id for ref in refs])
        batch = PairBatch(
            winner=winner,
            loser=loser,
            conditioning=self.embeddings.select([ref.prompt for ref in refs]),
            keys=tuple(f"{row.ref.pair_id}@{row.epoch}" for row in drawn),
        )
        if self._has_uncertainty:
            batch = replace(
                batch,
                uncertainty_winner=torch.tensor([ref.uncertainty_winner or 0.0 for ref in refs]),
                uncertainty_loser=torch.tensor([ref.uncertainty_loser or 0.0 for ref in refs]),
            )
        return self._with_contrast(batch, contrast) if contrast else batch

    def _draws(
        self, refs: Sequence[PairRef], weights: np.ndarray | None, name: str, count: int
    ) -> Draws[PairRef]:
        # winner and loser have one size
        size_of = lambda ref: ref.winner_id
        return Draws(refs, weights, self.name(name), count, sizes=self.sizes, sample_id=size_of)

    def _with_contrast(self, batch: PairBatch, drawn: Sequence[Drawn[PairRef]]) -> PairBatch:
        refs = [row.ref for row in drawn]
        explored, main = self._read(
            [str(ref.explored_id) for ref in refs], [str(ref.main_id) for ref in refs]
        )
        return replace(
            batch,
            explored=explored,
            main=main,
            contrast_conditioning=self.embeddings.select([ref.prompt for ref in refs]),
            contrast_keys=tuple(f"{row.ref.pair_id}@contrast{row.epoch}" for row in drawn),
        )

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


def _newest(refs: Sequence[PairRef]) -> int | None:
    """The newest collection that pairs come from; None where all are offline."""
    return max((ref.iteration for ref in refs if ref.source != "offline"), default=None)
