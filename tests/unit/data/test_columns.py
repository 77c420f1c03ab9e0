"""Rows in Arrow columns are the rows that were stored, and an index of them is what reading each row gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffexpo.config.schema import HybridConfig
from diffexpo.data.columns import Columns
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.pairs import PairRef, contrast_refs, pair_index
from diffexpo.data.statistics import summarise_store
from diffexpo.data.store import Store
from tests.rows import pair_row

from .conftest import LetterPolicy, fill, vote


@pytest.fixture
def store(tmp_path: Path, write_votes, policy: LetterPolicy) -> Store:
    """Offline pairs, three collections, people's pairs of the second, and a fourth without contrast."""
    store = Store(tmp_path / "store")
    import_offline(write_votes([vote(n) for n in range(5)]), policy, store)
    for iteration, count in ((1, 6), (2, 4), (3, 5)):
        fill(store, iteration, count, uncertainty_winner=0.5 if iteration == 2 else None)
    store.append_pairs(2, 0, [pair_row("asked", "2w0", "2l1", source="human")], stage="label")
    store.write_manifest("label", 2, {})
    return store


@pytest.mark.parametrize(
    ("iteration", "hybrid"), [(4, {}), (3, {"decay": 0.5}), (4, {"offline_weight": 0.0})]
)
def test_an_index_is_what_reading_every_pair_gives(
    store: Store, iteration: int, hybrid: dict[str, float]
) -> None:
    settings = HybridConfig(**hybrid)
    index = pair_index(store, settings, iteration)
    newest = iteration - 1
    weigh = lambda row: (
        settings.offline_weight if row.source == "offline" else settings.decay ** (newest - row.iteration)
    )
    rows = [row for row in store.pairs() if row.iteration < iteration and weigh(row) > 0]
    names = ("iteration", "source", "prompt", "pair_id", "winner_id", "loser_id", "uncertainty_winner")
    told = [tuple(getattr(row, name) for name in names) for row in rows]
    assert [tuple(getattr(ref, name) for name in names) for ref in index.refs] == told
    assert index.weights.tolist() == [weigh(row) for row in rows]
    assert index.prompts() == list(dict.fromkeys(row.prompt for row in rows))
    counts = sorted(Counter(row.source for row in rows).items())
    assert index.by_source() == ", ".join(f"{count} {source}" for source, count in counts)
    couples = [row for row in rows if row.iteration == newest and row.explored_id and row.main_id]
    found = [(ref.pair_id, ref.explored_id, ref.main_id) for ref in contrast_refs(store, index)]
    assert found == [(row.pair_id, row.explored_id, row.main_id) for row in couples]
    assert index.newest == newest


def test_a_column_without_values_is_left_out_and_its_field_has_its_default(store: Store) -> None:
    first = pair_index(store, HybridConfig(), 2).refs
    assert not first.has("uncertainty_winner") and first[0].uncertainty_winner is None
    assert not first.is_given("uncertainty_winner").any()
    later = pair_index(store, HybridConfig(), 3).refs
    assert later.has("uncertainty_winner") and later.is_given("uncertainty_winner").sum() == 4
    assert isinstance(later[-1], PairRef) and later[-1] == later[len(later) - 1]
    assert [ref.pair_id for ref in later[2:4]] == [later[2].pair_id, later[3].pair_id]


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    empty = Columns(Store(tmp_path).table("pairs", ["source", "prompt"], encoded=["source", "prompt"]), dict)
    assert (
        len(empty) == 0 and empty.counts("source") == {} and empty.equals("source", "offline").tolist() == []
    )
    assert summarise_store(Store(tmp_path))["pairs"] == 0


def test_counts_are_those_of_the_rows(store: Store) -> None:
    counted = summarise_store(store)
    pairs, samples = store.pairs(), store.samples()
    assert (counted["pairs"], counted["samples"]) == (len(pairs), len(samples)) == (21, 40)
    assert counted["pairs by source"] == {"human": 1, "online": 15, "offline": 5}
    assert counted["winners by agent"] == dict(Counter(str(row.winner_agent) for row in pairs))
    assert counted["samples by agent"] == dict(Counter(row.agent for row in samples))
    assert counted["pair prompts"] == len({row.prompt for row in pairs})
    margins = sorted(row.margin for row in pairs if row.margin is not None)
    assert counted["margin (median)"] == np.float64(margins[len(margins) // 2])
