r"""Which pairs an iteration learns from, and the batch of any step.

An epoch is a draw without replacement in which a pair's probability is proportional to its weight, exactly:

    M = floor(sum w / max w),   P(i in epoch) = M w_i / sum w        (systematic sampling over a random order)

With equal weights that is a plain shuffled epoch of all pairs. Each epoch's order comes from one generator
named by (run seed, iteration, epoch), so `batch(step)` needs no history: position p = step * B + row stands
in epoch p // M at place p % M. Within a batch pairs of one picture size stand behind each other, whatever the
order they were drawn in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import HybridConfig
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.data.store import Store
from diffexpo.errors import DataError, StoreError
from diffexpo.rng import numpy_generator
from diffexpo.types import MixedRows, PairBatch


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


@dataclass(frozen=True)
class PairIndex:
    """Pairs with their sampling weights, all positive."""

    refs: tuple[PairRef, ...]
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.refs)

    def prompts(self) -> list[str]:
        """Distinct prompts, in order."""
        return list(dict.fromkeys(ref.prompt for ref in self.refs))


class PairSource:
    """The hybrid mixture: offline pairs and all pairs collected so far, by weight."""

    def __init__(self, store: Store, hybrid: HybridConfig) -> None:
        self._store = store
        self._hybrid = hybrid

    def index(self, iteration: int) -> PairIndex:
        """Pairs that iteration t trains on: D_off and D_1 .. D_{t-1}.

            weight = offline_weight for D_off,   decay ** (newest - k) for D_k

        Args:
            iteration: t >= 1. Later collections are not read, whatever the store holds.
        Returns:
            Pairs of positive weight, in the store's order. While nothing is collected yet, D_off weighs 1
            whatever `offline_weight` says: there is nothing else to learn from.
        Raises:
            DataError: no pair is left.
        """
        refs = [ref for ref in self._store.pairs(view=PairRef) if ref.iteration < iteration]
        newest = max((ref.iteration for ref in refs if ref.source != "offline"), default=None)
        weights = np.array(
            [hybrid_weight(self._hybrid, ref.source, ref.iteration, newest) for ref in refs], dtype=np.float64
        )
        kept = np.flatnonzero(weights > 0)
        if len(kept) == 0:
            raise DataError(
                f"iteration {iteration} has no pairs to train on ({len(refs)} in the store, none of "
                "positive weight): set "
                "offline.source, or check why pairing kept nothing (pairs/dropped_ties, pairing.min_margin)"
            )
        return PairIndex(tuple(refs[i] for i in kept), weights[kept])


def hybrid_weight(hybrid: HybridConfig, source: str, iteration: int, newest: int | None) -> float:
    """Sampling weight of what was collected in an iteration, `newest` being the last collection (None: there
    is none)."""
    if newest is None:
        return 1.0
    if source == "offline":
        return hybrid.offline_weight
    return hybrid.decay ** (newest - iteration)


@dataclass(frozen=True)
class Draw:
    """Pairs of (part of) one batch: (pair, epoch) couples, and those of the contrast term."""

    pairs: tuple[tuple[PairRef, int], ...]
    contrast: tuple[tuple[PairRef, int], ...]


class PairLoader:
    """Batches by step number, without state: any step, any order, any process.

    Args:
        store: Where latents lie.
        index: Pairs and weights, from `PairSource.index`.
        embeddings: Text side.
        batch_size: B pairs a step, over all processes.
        run_seed, iteration: Names of the random numbers.
        contrast_per_batch: E contrast pairs a step, drawn from the newest collection's pairs that have one;
            0 is none. With no such pairs (the first iteration) batches carry none.
        sizes: Picture sizes by sample id, where there are several (`Store.sizes`).
    """

    def __init__(
        self,
        store: Store,
        index: PairIndex,
        embeddings: PromptEmbeddings,
        *,
        batch_size: int,
        run_seed: int,
        iteration: int,
        contrast_per_batch: int = 0,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._store = store
        self._sizes = sizes or {}
        self._index = index
        self._embeddings = embeddings
        self._name = (run_seed, iteration)
        self.batch_size = batch_size
        self.size = len(index)
        candidates = _contrast_refs(index.refs)
        self.contrast_per_batch = contrast_per_batch if candidates else 0
        self._pairs = Epochs(index.weights, (*self._name, "batch"))
        self._contrast_refs = candidates
        self._contrast = Epochs(np.ones(len(candidates)), (*self._name, "contrast"))
        self._has_uncertainty = any(
            ref.uncertainty_winner is not None or ref.uncertainty_loser is not None for ref in index.refs
        )

    @property
    def epoch_length(self) -> int:
        """M, the number of pairs in an epoch; all of them with equal weights."""
        return self._pairs.length

    def describe(self) -> str:
        """One line for a person: how many pairs from where."""
        counts = Counter(ref.source for ref in self._index.refs)
        parts = ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))
        per_epoch = "" if self.epoch_length == self.size else f"; {self.epoch_length} an epoch by weight"
        return f"{self.size} pairs ({parts}{per_epoch})"

    def refs(self, step: int, start: int = 0, stop: int | None = None) -> Draw:
        """Which pairs stand in rows [start, stop) of a step's batch, without reading latents.

        Contrast rows are split in proportion, so the parts of a batch add up to it.
        """
        size, extra = self.batch_size, self.contrast_per_batch
        stop = size if stop is None else stop
        if not (step >= 0 and 0 <= start < stop <= size):
            raise ValueError(
                f"rows [{start}, {stop}) of step {step}: a batch has {size} rows and steps count from 0"
            )
        pairs = self._drawn(self._pairs, self._index.refs, step * size, size)
        contrast = self._drawn(self._contrast, self._contrast_refs, step * extra, extra)
        low, high = start * extra // size, stop * extra // size
        return Draw(pairs[start:stop], contrast[low:high])

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> PairBatch:
        """Rows [start, stop) of the batch of a step (from 0), the whole batch by default; reads only those
        latents.
        """
        draw = self.refs(step, start, stop)
        refs = [ref for ref, _ in draw.pairs]
        winner, loser = self._read([ref.winner_id for ref in refs], [ref.loser_id for ref in refs])
        gammas: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._has_uncertainty:
            gammas = (
                torch.tensor([ref.uncertainty_winner or 0.0 for ref in refs]),
                torch.tensor([ref.uncertainty_loser or 0.0 for ref in refs]),
            )
        batch = PairBatch(
            winner=winner,
            loser=loser,
            conditioning=self._embeddings.select([ref.prompt for ref in refs]),
            keys=tuple(f"{ref.pair_id}@{epoch}" for ref, epoch in draw.pairs),
            uncertainty_winner=gammas[0],
            uncertainty_loser=gammas[1],
        )
        return self._with_contrast(batch, draw) if draw.contrast else batch

    def shard(self, step: int, rank: int, world: int) -> PairBatch:
        """One process's rows of a step's batch; the shards of all processes are the batch."""
        return self.batch(step, rank * self.batch_size // world, (rank + 1) * self.batch_size // world)

    def _with_contrast(self, batch: PairBatch, draw: Draw) -> PairBatch:
        refs = [ref for ref, _ in draw.contrast]
        explored, main = self._read([ref.explored_id for ref in refs], [ref.main_id for ref in refs])
        return PairBatch(
            winner=batch.winner,
            loser=batch.loser,
            conditioning=batch.conditioning,
            keys=batch.keys,
            uncertainty_winner=batch.uncertainty_winner,
            uncertainty_loser=batch.uncertainty_loser,
            explored=explored,
            main=main,
            contrast_conditioning=self._embeddings.select([ref.prompt for ref in refs]),
            contrast_keys=tuple(f"{ref.pair_id}@contrast{epoch}" for ref, epoch in draw.contrast),
        )

    def _read(self, ids: list[str], others: list[str]) -> tuple[Tensor | MixedRows, Tensor | MixedRows]:
        """Latents of both sides of pairs; they are compared at one noise, so they must be alike.

        Raises:
            StoreError: two of a pair differ in shape or type.
        """
        sides = [self._store.stretches(names) for names in (ids, others)]
        kinds = [[(part.shape, part.dtype) for part in side] for side in sides]
        if kinds[0] != kinds[1]:
            raise StoreError(
                f"the latents of {ids[0]!r} and other samples differ in shape or type from those of "
                f"{others[0]!r} and others, which "
                "they are paired with; a store belongs to one model: import or collect into a new run"
            )
        return stacked(sides[0]), stacked(sides[1])

    def _drawn(
        self, epochs: Epochs, refs: Sequence[PairRef], first: int, count: int
    ) -> tuple[tuple[PairRef, int], ...]:
        """(pair, epoch) at so many positions, those of one size behind each other; winner and loser have one
        size."""
        drawn = [(refs[i], epoch) for i, epoch in epochs.take(first, first + count)]
        if self._sizes:
            drawn.sort(key=lambda entry: self._sizes.get(entry[0].winner_id, (0, 0)))
        return tuple(drawn)


class Epochs:
    """An endless, randomly addressable sequence of indices: epoch after epoch, each drawn by weight without
    replacement.

    Args:
        weights: Positive, (N,); only their ratios matter.
        name: Key of the generators; epoch e uses (*name, e).
    """

    def __init__(self, weights: np.ndarray, name: tuple[str | int, ...]) -> None:
        self._name = name
        self._weights = weights
        # the small term keeps sums like 10 x 0.1 from losing a pair to rounding
        self.length = int(np.floor(weights.sum() / weights.max() + 1e-9)) if len(weights) else 0
        self._orders: dict[int, np.ndarray] = {}

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(index, epoch) at positions [start, stop)."""
        return [
            (int(self._order(position // self.length)[position % self.length]), position // self.length)
            for position in range(start, stop)
        ]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) >= 4:
                self._orders.clear()
            self._orders[epoch] = self._draw(epoch)
        return self._orders[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        generator = numpy_generator(*self._name, epoch)
        order = generator.permutation(len(self._weights))
        if self.length == len(order):
            return order
        # lay the shares M w / sum w (each <= 1) on a line in random order and pick what stands at u, u +
        # 1, ..., u + M - 1
        ends = np.cumsum(self._weights[order])
        ends *= self.length / ends[-1]
        points = generator.random() + np.arange(self.length)
        return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]


def _contrast_refs(refs: tuple[PairRef, ...]) -> tuple[PairRef, ...]:
    newest = max((ref.iteration for ref in refs if ref.source != "offline"), default=None)
    return tuple(
        ref
        for ref in refs
        if ref.iteration == newest
        and ref.source != "offline"
        and ref.explored_id is not None
        and ref.main_id is not None
    )
