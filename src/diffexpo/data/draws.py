r"""Which rows make up the batch of any step, for every kind of data.

An epoch is a draw without replacement in which a row's probability is proportional to its weight, exactly:

    M = floor(sum w / max w),   P(i in epoch) = M w_i / sum w        (systematic sampling over a random order)

With equal weights that is a plain shuffled epoch of all rows. Each epoch's order comes from one generator
named by (run seed, iteration, epoch), so a batch needs no history: position p = step * B + row is in epoch
p // M at place p % M. Within a batch images of one size are consecutive, whatever order they were drawn in.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from diffexpo.config.schema import HybridConfig
from diffexpo.rng import numpy_generator


@dataclass(frozen=True, slots=True)
class CollectedRef:
    """What the refs of pairs and of images share."""

    iteration: int
    source: str
    prompt: str


Ref = TypeVar("Ref")
Collected = TypeVar("Collected", bound=CollectedRef)


@dataclass(frozen=True)
class Index(Generic[Collected]):
    """Rows to learn from with their sampling weights, all positive."""

    refs: Sequence[Collected]
    weights: np.ndarray

    def prompts(self) -> list[str]:
        """Distinct prompts, in order."""
        return list(dict.fromkeys(ref.prompt for ref in self.refs))

    def by_source(self) -> str:
        """How many rows come from where, e.g. "4 offline, 8 online"."""
        counts = Counter(ref.source for ref in self.refs)
        return ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))


def hybrid_weights(
    hybrid: HybridConfig, iterations: np.ndarray, is_offline: np.ndarray, newest: int | None
) -> np.ndarray:
    """Sampling weights of rows (N,), `newest` being the last collection (None: there is none).

    weight = offline_weight for D_off,   decay ** (newest - k) for D_k,   1 while nothing is collected
    """
    if newest is None:
        return np.ones(len(iterations))
    distinct, place = np.unique(iterations, return_inverse=True)
    by_age = np.array([hybrid.decay ** (newest - int(k)) for k in distinct], dtype=np.float64)
    return np.where(is_offline, float(hybrid.offline_weight), by_age[place])


def positions_by(rows: Iterable[Ref], key: Callable[[Ref], Hashable]) -> list[list[int]]:
    """Positions of rows of the same key, in the order in which the keys first appear."""
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return list(groups.values())


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
        # the small term keeps sums like 10 x 0.1 from losing a row to rounding
        self.length = int(np.floor(weights.sum() / weights.max() + 1e-9)) if len(weights) else 0
        self._order = lru_cache(maxsize=4)(self._draw)

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(index, epoch) at positions [start, stop)."""
        places = (divmod(position, self.length) for position in range(start, stop))
        return [(int(self._order(epoch)[place]), epoch) for epoch, place in places]

    def _draw(self, epoch: int) -> np.ndarray:
        generator = numpy_generator(*self._name, epoch)
        order = generator.permutation(len(self._weights))
        if self.length == len(order):
            return order
        # lay the shares M w / sum w (each <= 1) on a line in random order and pick what is at u, u + 1,
        # ..., u + M - 1
        ends = np.cumsum(self._weights[order])
        ends *= self.length / ends[-1]
        points = generator.random() + np.arange(self.length)
        return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]


@dataclass(eq=False, kw_only=True)
class Loader:
    """Batches by step number, without state: any step, any order, any process.

    Args:
        batch_size: Rows per step, over all processes; of units of several rows as in `Draws`.
        run_seed, iteration: Names of the random numbers.
    """

    batch_size: int
    run_seed: int
    iteration: int

    def fingerprint(self) -> str:
        """A digest of all rows that batches are drawn of, in order, with their weights."""
        digest = hashlib.sha256("\n".join(self.row_names()).encode())
        digest.update(np.ascontiguousarray(self.row_weights()).tobytes())
        return digest.hexdigest()[:16]

    def row_names(self) -> Iterable[str]:
        """A name of each row."""
        raise NotImplementedError

    def row_weights(self) -> np.ndarray:
        """Weights of the draw; none where all rows are alike."""
        return np.empty(0)

    def name(self, what: str = "batch") -> tuple[str | int, ...]:
        """Key of the generators of its draws."""
        return self.run_seed, self.iteration, what


class Drawn(NamedTuple, Generic[Ref]):
    """A row of a batch: what it is, the epoch of its draw, and the draw's number in the whole sequence."""

    ref: Ref
    epoch: int
    number: int


@dataclass(eq=False)
class Draws(Generic[Ref]):
    """The rows of the batch of any step, in any order, in any process.

    Args:
        refs: Rows, in an order that no process changes.
        weights: Sampling weights (N,), all positive; all 1 by default.
        name: Key of the generators.
        num_rows: Rows per step, over all processes. Of units of several rows as many are drawn as have about
            that many rows, at least one.
        units: Positions of the rows that are drawn together; each alone by default.
        sizes: Image sizes by sample id, where there are several; rows of one size are then consecutive.
        sample_id: The image that gives a row its size.
    """

    refs: Sequence[Ref]
    weights: np.ndarray | None
    name: tuple[str | int, ...]
    num_rows: int
    _: KW_ONLY
    units: Sequence[Sequence[int]] | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None
    sample_id: Callable[[Ref], str] = lambda ref: ""

    def __post_init__(self) -> None:
        count = len(self.refs)
        weights = np.ones(count) if self.weights is None else self.weights
        if self.units is not None:
            weights = weights[[unit[0] for unit in self.units]]
        self._per_batch = min(self.num_rows, max(1, self.num_rows * len(weights) // max(1, count)))
        self.epochs = Epochs(weights, self.name)

    def batch(self, step: int) -> list[Drawn[Ref]]:
        """The rows of the batch of a step, from 0."""
        first = step * self._per_batch
        drawn = [
            Drawn(self.refs[i], epoch, first + place)
            for place, (unit, epoch) in enumerate(self.epochs.take(first, first + self._per_batch))
            for i in ([unit] if self.units is None else self.units[unit])
        ]
        if sizes := self.sizes:
            drawn.sort(key=lambda row: sizes.get(self.sample_id(row.ref), (0, 0)))
        return drawn
