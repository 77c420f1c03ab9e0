"""What a run has stored, counted column by column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffexpo.data.columns import Columns
from diffexpo.data.images import size_name
from diffexpo.data.store import Store

_TEXTS = ("agent", "prompt", "source", "judge", "winner_agent")


def summarise_store(store: Store) -> dict[str, object]:
    """Counts of a store's complete stages: samples and pairs by iteration, source, agent and judge.

    Returns:
        Counts by name, e.g. {"samples": 64, "pairs": 8, "pairs by source": {"online": 8}, ...}.
    Raises:
        StoreError: a shard is damaged.
    """
    samples = _columns(store, "samples", ["iteration", "agent", "prompt"])
    pairs = _columns(store, "pairs", ["iteration", "source", "judge", "winner_agent", "prompt", "margin"])
    given = pairs.is_given("margin")
    margins = np.sort(pairs.numbers("margin")[given]) if given.any() else np.empty(0)
    return {
        "samples": len(samples),
        "samples by iteration": _sorted(samples.counts("iteration")),
        "samples by agent": _sorted(samples.counts("agent")),
        "samples by size": sample_sizes(store),
        "sample prompts": len(samples.counts("prompt")),
        "pairs": len(pairs),
        "pairs by iteration": _sorted(pairs.counts("iteration")),
        "pairs by source": _sorted(pairs.counts("source")),
        "pairs by judge": _sorted(pairs.counts("judge")),
        "winners by agent": _sorted(pairs.counts("winner_agent")),
        "pair prompts": len(pairs.counts("prompt")),
        "margin (median)": float(margins[len(margins) // 2]) if len(margins) else None,
    }


def sample_sizes(store: Store) -> dict[str, int]:
    """Number of samples by the size of their images, "height x width", the most frequent first."""
    samples = _columns(store, "samples", ["height", "width"])
    if not samples.has("height"):
        return {}
    known = samples.is_given("height")
    sides = np.stack([samples.numbers(name)[known] for name in ("height", "width")]).astype(np.int64)
    sizes, first, counts = np.unique(sides, axis=1, return_index=True, return_counts=True)
    found = {size_name(*map(int, sizes[:, k])): int(counts[k]) for k in np.argsort(first)}
    return dict(Counter(found).most_common())


def _columns(store: Store, kind: str, names: Sequence[str]) -> Columns[dict[str, object]]:
    texts = [name for name in names if name in _TEXTS]
    return Columns(store.table(kind, names, encoded=texts), dict)


def _sorted(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
