"""What a run has stored, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from diffexpo.data.images import size_name
from diffexpo.data.store import Row, Store


def summarise_store(store: Store) -> dict[str, object]:
    """Counts of a store's complete stages: samples and pairs by iteration, source, agent and judge.

    Returns:
        Counts by name, e.g. {"samples": 64, "pairs": 8, "pairs by source": {"online": 8}, ...}.
    Raises:
        StoreError: a shard is damaged.
    """
    samples = store.samples(columns=["iteration", "agent", "prompt", "height", "width"])
    columns = ["iteration", "source", "judge", "winner_agent", "prompt", "margin"]
    pairs = store.pairs(columns=columns)
    margins = sorted(float(row["margin"]) for row in pairs if row["margin"] is not None)
    return {
        "samples": len(samples),
        "samples by iteration": _counted(samples, "iteration"),
        "samples by agent": _counted(samples, "agent"),
        "samples by size": sample_sizes(samples),
        "sample prompts": len({row["prompt"] for row in samples}),
        "pairs": len(pairs),
        "pairs by iteration": _counted(pairs, "iteration"),
        "pairs by source": _counted(pairs, "source"),
        "pairs by judge": _counted(pairs, "judge"),
        "winners by agent": _counted(pairs, "winner_agent"),
        "pair prompts": len({row["prompt"] for row in pairs}),
        "margin (median)": margins[len(margins) // 2] if margins else None,
    }


def sample_sizes(samples: Iterable[Row]) -> dict[str, int]:
    """Number of samples by the size of their pictures, "height x width", the most frequent first."""
    counts = Counter(size_name(row["height"], row["width"]) for row in samples if row["height"] is not None)
    return dict(counts.most_common())


def _counted(rows: Iterable[Row], column: str) -> dict[str, int]:
    counts = Counter(str(row[column]) for row in rows)
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
