"""What a run has stored, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from diffexpo.data.images import size_name
from diffexpo.data.rows import ImageSize
from diffexpo.data.store import Store


@dataclass(frozen=True, slots=True)
class _CountedSample(ImageSize):
    iteration: int
    agent: str
    prompt: str


@dataclass(frozen=True, slots=True)
class _CountedPair:
    iteration: int
    source: str
    judge: str
    winner_agent: str | None
    prompt: str
    margin: float | None


def summarise_store(store: Store) -> dict[str, object]:
    """Counts of a store's complete stages: samples and pairs by iteration, source, agent and judge.

    Returns:
        Counts by name, e.g. {"samples": 64, "pairs": 8, "pairs by source": {"online": 8}, ...}.
    Raises:
        StoreError: a shard is damaged.
    """
    samples, pairs = store.samples(view=_CountedSample), store.pairs(view=_CountedPair)
    margins = sorted(pair.margin for pair in pairs if pair.margin is not None)
    return {
        "samples": len(samples),
        "samples by iteration": _counted(samples, "iteration"),
        "samples by agent": _counted(samples, "agent"),
        "samples by size": sample_sizes(samples),
        "sample prompts": len({sample.prompt for sample in samples}),
        "pairs": len(pairs),
        "pairs by iteration": _counted(pairs, "iteration"),
        "pairs by source": _counted(pairs, "source"),
        "pairs by judge": _counted(pairs, "judge"),
        "winners by agent": _counted(pairs, "winner_agent"),
        "pair prompts": len({pair.prompt for pair in pairs}),
        "margin (median)": margins[len(margins) // 2] if margins else None,
    }


def sample_sizes(samples: Iterable[ImageSize]) -> dict[str, int]:
    """Number of samples by the size of their images, "height x width", the most frequent first."""
    counts = Counter(size_name(one.height, one.width) for one in samples if one.height is not None)
    return dict(counts.most_common())


def _counted(rows: Iterable[object], column: str) -> dict[str, int]:
    counts = Counter(str(getattr(row, column)) for row in rows)
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
