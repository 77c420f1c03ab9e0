"""Which pairs an iteration learns from, and the batch of any step (see `draws`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import HybridConfig
from diffexpo.data.draws import Drawn, Draws, Index, hybrid_weights
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.data.store import Store
from diffexpo.errors import DataError, StoreError
from diffexpo.types import PairBatch


@dataclass(frozen=True, slots=True)
class PairRef:
    """What training reads of a stored pair before its latents: a view of `Pair`."""

    pair_id: str
    iteration: int
    source: str
    prompt: str
    winner_id: str
    loser_id: str
    explored_id: str | None = None
    main_id: str | None = None
    uncertainty_winner: float | None = None
    uncertainty_loser: float | None = None


PairIndex = Index[PairRef]


class PairSource:
    """The hybrid mixture: offline pairs and all pairs collected so far, by weight."""

    def __init__(self, store: Store, hybrid: HybridConfig) -> None:
        self._store = store
        self._hybrid = hybrid

    def index(self, iteration: int) -> PairIndex:
        """Pairs that iteration t trains on: D_off and D_1 .. D_{t-1}.

            weight = offline_weight for D_off,   decay ** (newest - k) for D_k

        Later collections are not read, whatever the store holds. The result has pairs of positive weight, in
        the store's order. While nothing is collected yet, D_off weighs 1 whatever `offline_weight` says, as
        there is nothing else to learn from. A DataError is raised when no pair is left.
        """
        refs = [ref for ref in self._store.pairs(view=PairRef) if ref.iteration < iteration]
        weights = hybrid_weights(self._hybrid, refs, _newest(refs))
        kept = np.flatnonzero(weights > 0)
        if len(kept) == 0:
            raise DataError(
                f"iteration {iteration} has no pairs to train on ({len(refs)} in the store, none of positive "
                "weight): set offline.source, or check why pairing kept nothing (pairs/dropped_ties, "
                "pairing.min_margin)"
            )
        return PairIndex(tuple(refs[i] for i in kept), weights[kept])


@dataclass(frozen=True)
class Draw:
    """Pairs of (part of) one batch, and those of the contrast term."""

    pairs: list[Drawn[PairRef]]
    contrast: list[Drawn[PairRef]]


@dataclass(eq=False)
class PairLoader:
    """Batches by step number, without state: any step, any order, any process.

    Args:
        index: Pairs and weights, from `PairSource.index`.
        batch_size: Pairs per step, over all processes.
        run_seed, iteration: Names of the random numbers.
        contrast_per_batch: Contrast pairs per step, drawn from the newest collection's pairs that have one;
            0 is none. With no such pairs (the first iteration) batches carry none.
        sizes: Image sizes by sample id, where there are several (`Store.sizes`).
    """

    store: Store
    index: PairIndex
    embeddings: PromptEmbeddings
    _: KW_ONLY
    batch_size: int
    run_seed: int
    iteration: int
    contrast_per_batch: int = 0
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refs, candidates = self.index.refs, _contrast_refs(self.index.refs)
        self.size = len(refs)
        if not candidates:
            self.contrast_per_batch = 0
        self._pairs = self._draws(refs, self.index.weights, "batch", self.batch_size)
        self._contrast = self._draws(candidates, None, "contrast", self.contrast_per_batch)
        self._has_uncertainty = any(
            ref.uncertainty_winner is not None or ref.uncertainty_loser is not None for ref in refs
        )

    @property
    def epoch_length(self) -> int:
        """M, the number of pairs in an epoch; all of them with equal weights."""
        return self._pairs.epoch_length

    def describe(self) -> str:
        """One line for a person: how many pairs from where."""
        per_epoch = "" if self.epoch_length == self.size else f"; {self.epoch_length} an epoch by weight"
        return f"{self.size} pairs ({self.index.by_source()}{per_epoch})"

    def refs(self, step: int, start: int = 0, stop: int | None = None) -> Draw:
        """Which pairs rows [start, stop) of a step's batch hold, without reading latents.

        Contrast rows are split in proportion, so the parts of a batch add up to it.
        """
        size, extra = self.batch_size, self.contrast_per_batch
        pairs = self._pairs.part(step, start, stop)
        low, high = start * extra // size, (start + len(pairs)) * extra // size
        return Draw(pairs, self._contrast.all(step)[low:high])

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> PairBatch:
        """Rows [start, stop) of the batch of a step (from 0), the whole batch by default; reads only those
        latents.
        """
        draw = self.refs(step, start, stop)
        refs = [row.ref for row in draw.pairs]
        winner, loser = self._read([ref.winner_id for ref in refs], [ref.loser_id for ref in refs])
        batch = PairBatch(
            winner=winner,
            loser=loser,
            conditioning=self.embeddings.select([ref.prompt for ref in refs]),
            keys=tuple(f"{row.ref.pair_id}@{row.epoch}" for row in draw.pairs),
        )
        if self._has_uncertainty:
            batch = replace(
                batch,
                uncertainty_winner=torch.tensor([ref.uncertainty_winner or 0.0 for ref in refs]),
                uncertainty_loser=torch.tensor([ref.uncertainty_loser or 0.0 for ref in refs]),
            )
        return self._with_contrast(batch, draw.contrast) if draw.contrast else batch

    def shard(self, step: int, rank: int, world: int) -> PairBatch:
        """One process's rows of a step's batch; the shards of all processes are the batch."""
        return self.batch(step, rank * self.batch_size // world, (rank + 1) * self.batch_size // world)

    def _draws(
        self, refs: Sequence[PairRef], weights: np.ndarray | None, name: str, count: int
    ) -> Draws[PairRef]:
        # winner and loser have one size
        key = (self.run_seed, self.iteration, name)
        return Draws(refs, weights, key, count, sizes=self.sizes, sample_id=lambda ref: ref.winner_id)

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
        """Latents of both sides of pairs; they are compared at one noise, so shape and type must agree.

        Raises:
            StoreError: two of a pair differ in shape or type.
        """
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


def _contrast_refs(refs: Sequence[PairRef]) -> tuple[PairRef, ...]:
    newest = _newest(refs)
    return tuple(
        ref
        for ref in refs
        if (ref.iteration == newest and ref.source != "offline")
        and (ref.explored_id is not None and ref.main_id is not None)
    )
