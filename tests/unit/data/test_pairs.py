"""Batches are a function of (seed, iteration, step) alone, and weights mean what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.config.schema import HybridConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.pairs import PairLoader, pair_index
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.training.batches import micro_batches
from tests.rows import latents_of, pair_row

from .conftest import LetterPolicy, fill, vote


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for iteration, count in ((1, 10), (2, 6), (3, 5)):
        fill(store, iteration, count)
    return store


def make_loader(
    store: Store, iteration: int = 4, contrast: int = 0, seed: int = 0, batch_size: int = 8
) -> PairLoader:
    index = pair_index(store, HybridConfig(), iteration)
    return PairLoader(
        store, index, PromptEmbeddings(LetterPolicy(), index.prompts()), batch_size=batch_size, run_seed=seed,
        iteration=iteration, contrast_per_batch=contrast,
    )  # fmt: skip


def test_a_batch_holds_the_stored_latents_and_texts(store: Store) -> None:
    batch = make_loader(store).batch(3)
    for row, key in enumerate(batch.keys):
        pair = store.lineage(key.split("@")[0]).pair
        for tensor, name in ((batch.winner, pair.winner_id), (batch.loser, pair.loser_id)):
            np.testing.assert_array_equal(tensor[row].numpy(), latents_of([name])[name])
        letters = [ord(letter) for letter in pair.prompt[:8].ljust(8)]
        assert batch.conditioning.tensors["letters"][row].tolist() == letters
    assert batch.weight is None and batch.explored is None and batch.uncertainty_winner is None


def test_any_step_in_any_order_by_any_loader_is_the_same(store: Store) -> None:
    one, two = make_loader(store), make_loader(store)
    forward = [one.batch(step).keys for step in range(12)]
    backward = [two.batch(step).keys for step in reversed(range(12))]
    assert forward == backward[::-1]
    assert forward != [make_loader(store, seed=1).batch(step).keys for step in range(12)]


def test_equal_weights_give_plain_shuffled_epochs_across_batch_borders(store: Store) -> None:
    loader = make_loader(store)
    keys = [key for step in range(21) for key in loader.batch(step).keys]  # 21 pairs x 8 epochs
    assert loader.draws.epochs.length == loader.size == 21
    epochs = [keys[start : start + 21] for start in range(0, len(keys), 21)]
    names = [[key.split("@")[0] for key in epoch] for epoch in epochs]
    assert all(len(set(epoch)) == 21 for epoch in names) and len(set(map(tuple, names))) == 8
    assert [{key.split("@")[1] for key in epoch} for epoch in epochs] == [{str(e)} for e in range(8)]
    assert len(set(keys)) == len(keys)


def test_a_batch_reads_only_its_own_latents(store: Store) -> None:
    loader = make_loader(store, batch_size=2)
    wanted = {name for row in loader.draws.batch(0) for name in (row.ref.winner_id, row.ref.loser_id)}
    kept = {str(store.sample(name).latent_file) for name in wanted}
    for path in store.root.glob("latents-*"):
        if path.name not in kept:
            path.unlink()
    assert len(loader.batch(0)) == 2


def test_contrast_pairs_come_from_the_newest_collection(store: Store) -> None:
    loader = make_loader(store, iteration=4, contrast=2)
    drawn = [loader.batch(step) for step in range(10)]
    names = [key.split("@")[0] for batch in drawn for key in batch.contrast_keys]
    assert set(names) == {f"pair 3 {k}" for k in range(5)} and set(Counter(names).values()) == {4}
    for batch in drawn:
        assert batch.explored is not None and batch.explored.shape == batch.main.shape == (2, 3, 8, 8)
        name = batch.contrast_keys[0].split("@")[0].split()
        np.testing.assert_array_equal(batch.main[0].numpy(), latents_of([f"3l{name[2]}"])[f"3l{name[2]}"])
    assert len({key for batch in drawn for key in batch.contrast_keys}) == 20


def test_pairs_do_not_depend_on_whether_there_is_contrast(store: Store) -> None:
    with_contrast, without = make_loader(store, contrast=2), make_loader(store)
    assert with_contrast.batch(7).keys == without.batch(7).keys


def test_uncertainty_is_carried_and_zero_where_there_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    fill(store, 1, 4)
    fill(store, 2, 4, uncertainty_winner=0.5, uncertainty_loser=0.25)
    batch = make_loader(store, iteration=3).batch(0)
    for key, high, low in zip(batch.keys, batch.uncertainty_winner, batch.uncertainty_loser, strict=True):
        assert (float(high), float(low)) == ((0.5, 0.25) if key.startswith("pair 2") else (0.0, 0.0))


def test_an_iteration_sees_only_what_was_collected_before_it(store: Store) -> None:
    assert {ref.iteration for ref in pair_index(store, HybridConfig(), 3).refs} == {1, 2}
    with pytest.raises(DataError, match="iteration 1 has no pairs to train on"):
        pair_index(store, HybridConfig(), 1)


def test_weights_follow_age_and_source(store: Store, write_votes, policy: LetterPolicy) -> None:
    import_offline(write_votes([vote(n) for n in range(4)]), policy, store)

    def weights(iteration: int, **hybrid: float) -> dict[tuple[str, int], set[float]]:
        index = pair_index(store, HybridConfig(**hybrid), iteration)
        found: dict[tuple[str, int], set[float]] = {}
        for ref, weight in zip(index.refs, index.weights, strict=True):
            found.setdefault((ref.source, ref.iteration), set()).add(float(weight))
        return found

    assert weights(4, offline_weight=0.3, decay=0.5) == {
        ("offline", 0): {0.3}, ("online", 1): {0.25}, ("online", 2): {0.5}, ("online", 3): {1.0},
    }  # fmt: skip
    assert weights(4, offline_weight=0.0, decay=0.0) == {("online", 3): {1.0}}
    assert weights(1, offline_weight=0.0) == {("offline", 0): {1.0}}  # nothing else to learn from yet


def test_a_batch_larger_than_an_epoch_repeats_pairs_under_new_keys(store: Store) -> None:
    batch = make_loader(store, iteration=2, batch_size=25).batch(0)
    assert len(set(batch.keys)) == 25 and len({key.split("@")[0] for key in batch.keys}) == 10


def test_an_embedding_depends_on_its_text_alone_and_is_made_once() -> None:
    policy = LetterPolicy()
    embeddings = PromptEmbeddings(policy, ["a", "b", "a"])
    embeddings.add(["b", "c"])
    rows = embeddings.select(["c", "a", "c", "d"])
    assert policy.encoded_texts == ["a", "b", "c", "d"] and len(embeddings) == 4
    assert torch.equal(rows.tensors["letters"][0], policy.encode_prompts(["c"]).tensors["letters"][0])


def test_embeddings_stay_within_their_memory() -> None:
    policy = LetterPolicy()
    row = 8 * 4  # bytes
    embeddings = PromptEmbeddings(policy, "abc", max_bytes=3 * row)
    embeddings.add("d")
    assert policy.encoded_texts == ["a", "b", "c"]
    embeddings.select(["a", "d"])
    assert len(embeddings) == 3
    embeddings.select(["a", "c", "d"])
    assert policy.encoded_texts == ["a", "b", "c", "d"]
    embeddings.select(["b"])
    assert policy.encoded_texts[-1] == "b"


def test_contrast_ids_may_be_absent(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    fill(store, 1, 3)
    fill(store, 2, 2, complete=False)
    store.discard_incomplete("pair", 2)
    store.append_pairs(2, 0, [pair_row("p", "2w0", "2l0")])
    for stage in ("collect", "pair"):
        store.write_manifest(stage, 2, {})
    loader = make_loader(store, iteration=3, contrast=2)
    assert loader.contrast_per_batch == 0 and loader.batch(0).contrast_keys == ()
    assert loader.describe() == "4 pairs (4 online)"


@pytest.mark.parametrize("contrast", [0, 3])
def test_processes_read_their_own_rows_and_together_the_whole_batch(store: Store, contrast: int) -> None:
    for step in range(3):
        whole = make_loader(store, contrast=contrast).batch(step)
        expected = [part for rank in range(2) for part in micro_batches(whole, 3, rank, 2)]
        found, read = [], []
        for rank in range(2):
            loader = make_loader(store, contrast=contrast)
            names: list[str] = []
            stretches = loader.store.stretches
            loader.store = Recording(stretches, names)  # type: ignore[assignment]
            found += micro_batches(loader.unread_batch(step), 3, rank, 2)
            read.append(len(names))
        # both sides of each pair, and of each contrast couple, once
        assert sum(read) == 2 * (len(whole) + len(whole.contrast_keys)) and max(read) <= sum(read) / 2 + 2
        for (part, factor), (other, weight) in zip(found, expected, strict=True):
            assert (part.keys, part.contrast_keys, factor) == (other.keys, other.contrast_keys, weight)
            for name in ("winner", "loser", "explored", "main", "weight"):
                one, two = getattr(part, name), getattr(other, name)
                assert one is two is None or torch.equal(one, two)
            assert torch.equal(part.conditioning.tensors["letters"], other.conditioning.tensors["letters"])


@dataclass
class Recording:
    """A store that remembers which latents were asked for."""

    read: Callable[[list[str]], list[np.ndarray]]
    names: list[str]

    def stretches(self, names: list[str]) -> list[np.ndarray]:
        self.names += names
        return self.read(names)
