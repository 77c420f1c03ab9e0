"""Scored images: batches are a function of (seed, iteration, step) alone, and advantages are those of whole groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from diffexpo.config.schema import HybridConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.scored import Keep, ScoredLoader, ScoredSource
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.training.batches import micro_batches
from tests.rows import latent_list, latents_of, pair_row, sample_row

from .conftest import LetterPolicy

# Rewards of the images of each request, by iteration; NaN is a failed score.
REWARDS = {
    1: [[0.0, 1.0, 2.0, 5.0], [3.0, 3.0, 3.0, 3.0], [1.0, np.nan, 2.0, 0.0]],
    2: [[1.0, 2.0, 3.0, 4.0], [9.0, 1.0, 1.0, 1.0]],
}


def mix(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return 10 * scores["judge"]


def centred(rewards: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Reward minus the mean of its group; NaN where it failed."""
    labels = np.array(groups)
    return np.array(
        [reward - np.nanmean(rewards[labels == group]) for reward, group in zip(rewards, labels, strict=True)]
    )


def fill(store: Store, iteration: int, *, units: int = 1, ranks: int = 1) -> None:
    rows = [
        sample_row(f"{iteration}-{group}-{place}", f"prompt {group}", group=group, rewards={"judge": reward})
        for group, rewards in enumerate(REWARDS[iteration])
        for place, reward in enumerate(rewards)
    ]
    for unit in range(units):
        part = rows[unit::units]
        names = [row.sample_id for row in part]
        store.append_unit(iteration, unit % ranks, unit, part, latent_list(names))
    store.write_manifest("collect", iteration, {})


def fill_offline(store: Store) -> None:
    """Picture a beats b and c, b beats c; another prompt has one pair."""
    names = ["a", "b", "c", "x", "y"]
    rows = [
        sample_row(name, "old" if name in "abc" else "odd", "offline", source="offline") for name in names
    ]
    store.append_unit(0, 0, 0, rows, latent_list(names), stage="offline")
    pairs = [("a", "b", "old"), ("a", "c", "old"), ("b", "c", "old"), ("y", "x", "odd")]
    store.append_pairs(
        0,
        0,
        [pair_row(f"p{w}{l}", w, l, prompt, source="offline") for w, l, prompt in pairs],
        stage="offline",
    )
    store.write_manifest("offline", 0, {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    fill_offline(store)
    fill(store, 1)
    fill(store, 2)
    return store


def make_source(
    store: Store, *, keep: Keep = "all", fraction: float | None = None, **hybrid: float
) -> ScoredSource:
    return ScoredSource(store, HybridConfig(**hybrid), mix, centred, keep=keep, desirable_fraction=fraction)


def make_loader(
    store: Store, *, iteration: int = 3, batch_size: int = 8, whole_groups: bool = False, **source: object
) -> ScoredLoader:
    index = make_source(store, **source).index(iteration)
    return ScoredLoader(
        store, index, PromptEmbeddings(LetterPolicy()), batch_size=batch_size, run_seed=0,
        iteration=iteration, whole_groups=whole_groups,
    )  # fmt: skip


def names(keys: Sequence[str]) -> list[str]:
    return [key.split("@")[0] for key in keys]


def test_rewards_are_mixed_and_advantages_are_of_the_whole_group(store: Store) -> None:
    refs = {ref.sample_id: ref for ref in make_source(store).index(3).refs}
    assert refs["1-0-3"].reward == 50.0
    assert [refs[f"1-0-{place}"].advantage for place in range(4)] == [-20.0, -10.0, 0.0, 30.0]
    assert [refs[f"1-1-{place}"].advantage for place in range(4)] == [0.0] * 4
    assert [refs[f"2-1-{place}"].desirable for place in range(4)] == [True, False, False, False]
    assert [refs[f"1-2-{place}"].advantage for place in (0, 2, 3)] == [0.0, 10.0, -10.0]
    assert len({ref.group for ref in refs.values()}) == 2 + 3 + 2


def test_a_failed_score_excludes_the_image_and_is_counted(store: Store) -> None:
    index = make_source(store).index(3)
    assert "1-2-1" not in {ref.sample_id for ref in index.refs}
    assert (len(index.refs), index.dropped_failed) == (5 + 11 + 8, 1)
    assert make_loader(store).describe() == (
        "24 images (5 offline, 19 online; 8 desirable; 1 without a score left out)"
    )


def test_offline_winners_are_desirable_and_losers_are_not(store: Store) -> None:
    refs = {ref.sample_id: ref for ref in make_source(store).index(1).refs}
    assert {name: ref.desirable for name, ref in refs.items()} == {
        "a": True, "b": True, "c": False, "x": False, "y": True,
    }  # fmt: skip
    assert [refs[name].reward for name in "abcxy"] == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert [refs[name].advantage for name in "abcxy"] == [0.5, 0.0, -0.5, -0.5, 0.5]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("best", {"a", "b", "y", "1-0-3", "1-1-0", "1-2-2"}),
        ("desirable", {"a", "b", "y", "1-0-3", "1-2-2"}),
        ("decided", {"a", "c", "x", "y", "1-0-0", "1-0-1", "1-0-3", "1-2-2", "1-2-3"}),
    ],
)
def test_what_is_kept(store: Store, keep: Keep, expected: set[str]) -> None:
    assert {ref.sample_id for ref in make_source(store, keep=keep).index(2).refs} == expected


def test_weights_follow_age_and_source(store: Store) -> None:
    index = make_source(store, offline_weight=0.3, decay=0.5).index(3)
    found = {(ref.source, ref.iteration): w for ref, w in zip(index.refs, index.weights, strict=True)}
    assert found == {("offline", 0): 0.3, ("online", 1): 0.5, ("online", 2): 1.0}
    assert {ref.iteration for ref in make_source(store, offline_weight=0.0, decay=0.0).index(3).refs} == {2}
    assert {ref.iteration for ref in make_source(store, offline_weight=0.0).index(1).refs} == {0}


def test_desirable_images_have_their_share_of_the_draw(store: Store) -> None:
    index = make_source(store, fraction=0.8, keep="decided", offline_weight=0.3).index(3)
    desirable = np.array([ref.desirable for ref in index.refs])
    assert index.weights[desirable].sum() / index.weights.sum() == pytest.approx(0.8, rel=1e-12)
    ratio = {ref.source: w for ref, w in zip(index.refs, index.weights, strict=True) if ref.desirable}
    assert ratio["offline"] / ratio["online"] == pytest.approx(0.3, rel=1e-12)


def test_a_batch_holds_the_stored_latents_texts_and_scores(store: Store) -> None:
    loader = make_loader(store)
    batch = loader.batch(2)
    refs = {ref.sample_id: ref for ref in make_source(store).index(3).refs}
    assert len(batch) == 8 and not batch.is_grouped and batch.weight is None
    for row, name in enumerate(names(batch.keys)):
        ref = refs[name]
        np.testing.assert_array_equal(batch.latents[row].numpy(), latents_of([name])[name])
        letters = [ord(letter) for letter in ref.prompt[:8].ljust(8)]
        assert batch.conditioning.tensors["letters"][row].tolist() == letters
        assert (batch.rewards[row], batch.advantages[row]) == (ref.reward, ref.advantage)
        assert (bool(batch.desirable[row]), int(batch.groups[row])) == (ref.desirable, ref.group)


def test_any_step_in_any_order_by_any_loader_is_the_same(store: Store) -> None:
    for whole_groups in (False, True):
        one, two = (make_loader(store, whole_groups=whole_groups) for _ in range(2))
        forward = [one.batch(step).keys for step in range(9)]
        assert forward == [two.batch(step).keys for step in reversed(range(9))][::-1]


def test_the_number_of_units_and_processes_that_collected_changes_nothing(tmp_path: Path) -> None:
    batches = []
    for units, ranks in ((1, 1), (4, 1), (5, 3)):
        store = Store(tmp_path / f"{units}-{ranks}")
        fill(store, 1, units=units, ranks=ranks)
        batches.append([make_loader(store, iteration=2).batch(step) for step in range(3)])
    for other in batches[1:]:
        for batch, expected in zip(other, batches[0], strict=True):
            assert batch.keys == expected.keys
            assert torch.equal(batch.latents, expected.latents)
            assert torch.equal(batch.advantages, expected.advantages)


def test_equal_weights_give_plain_shuffled_epochs(store: Store) -> None:
    loader = make_loader(store)
    keys = [key for step in range(6) for key in loader.batch(step).keys]  # 24 images x 2 epochs
    assert len(set(names(keys[:24]))) == len(set(names(keys[24:]))) == 24
    assert {key.split("@")[1] for key in keys[:24]} == {"0"}


def test_whole_groups_are_whole_and_survive_any_split(store: Store) -> None:
    loader = make_loader(store, whole_groups=True, offline_weight=0.0)
    sizes = {0: 4, 1: 4, 2: 3}
    for step in range(10):
        batch = loader.batch(step)
        assert batch.is_grouped
        for rank in range(2):
            for part, _ in micro_batches(batch, 2, rank, 2):
                for number in part.groups.unique():
                    members = [
                        name for name, g in zip(names(part.keys), part.groups, strict=True) if g == number
                    ]
                    iteration, group, _ = members[0].split("-")
                    assert all(member.startswith(f"{iteration}-{group}-") for member in members)
                    assert len(set(members)) == (sizes[int(group)] if iteration == "1" else 4)
    # 5 groups of 19 images: 8 images are 2 groups, and all 5 come once in an epoch of 5 draws
    drawn = [tuple(sorted({name[:3] for name in names(loader.batch(step).keys)})) for step in range(5)]
    assert sorted(group for batch in drawn for group in batch) == sorted(
        2 * ["1-0", "1-1", "1-2", "2-0", "2-1"]
    )


def test_a_group_that_is_drawn_twice_for_a_batch_counts_as_two(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, 2)
    batch = make_loader(store, whole_groups=True, batch_size=32).batch(0)
    assert len(batch) == 32 and len(batch.groups.unique()) == 8 and len(set(batch.keys)) == 32


def test_an_iteration_sees_only_what_was_collected_before_it(store: Store, tmp_path: Path) -> None:
    assert {ref.iteration for ref in make_source(store).index(2).refs} == {0, 1}
    empty = Store(tmp_path / "empty")
    with pytest.raises(DataError, match="iteration 1 has no images to train on"):
        make_source(empty).index(1)


def test_weights_are_of_the_whole_group_and_failed_scores_have_no_part_in_them(store: Store) -> None:
    def proportional(rewards: np.ndarray) -> np.ndarray:
        return len(rewards) * (1 + rewards) / (1 + rewards).sum()

    source = ScoredSource(store, HybridConfig(), mix, centred, weigh=proportional)
    index = source.index(3)
    groups: dict[int, list[float]] = {}
    for ref in index.refs:
        groups.setdefault(ref.group, []).append(ref.weight)
    assert sorted(map(len, groups.values())) == [2, 3, 3, 4, 4, 4, 4]
    assert all(sum(weights) == pytest.approx(len(weights)) for weights in groups.values())
    loader = ScoredLoader(
        store, index, PromptEmbeddings(LetterPolicy()), batch_size=8, run_seed=0, iteration=3
    )
    weight = {ref.sample_id: ref.weight for ref in index.refs}
    batch = loader.batch(0)
    assert batch.weight.tolist() == pytest.approx([weight[name] for name in names(batch.keys)])
    assert make_loader(store).batch(0).weight is None


@pytest.mark.parametrize("scope", ["prompt", "global"])
def test_images_of_weight_zero_are_not_drawn_and_the_expected_loss_stays(
    store: Store, scope: Literal["prompt", "global"]
) -> None:
    def best_only(rewards: np.ndarray) -> np.ndarray:
        best = (rewards == rewards.max()).astype(np.float64)
        return best * len(rewards) / best.sum()

    hybrid = HybridConfig(offline_weight=0.0)
    source = ScoredSource(store, hybrid, mix, centred, weigh=best_only, weigh_scope=scope)
    index = source.index(3)
    found = {(ref.iteration, ref.reward): ref.weight for ref in index.refs}
    # 19 images were scored (one of 20 failed). Prompts' best: one of 4, 4 equal of 4, one of 3 in the first collection;
    # one of 4 and one of 4 in the second.
    if scope == "prompt":
        share = 8 / 19
        expected = {(1, 50.0): 4, (1, 30.0): 1, (1, 20.0): 3, (2, 40.0): 4, (2, 90.0): 4}
    else:
        share = 2 / 19
        expected = {(1, 50.0): 11, (2, 90.0): 8}
    assert found == {key: pytest.approx(share * weight) for key, weight in expected.items()}
    assert sum(ref.weight or 0 for ref in index.refs) / len(index.refs) == pytest.approx(1)


def test_images_that_need_no_score_are_all_taken_failed_ones_too(store: Store) -> None:
    scored = make_source(store).index(3)
    index = ScoredSource(store, HybridConfig(), None, centred).index(3)
    assert index.dropped_failed == 0 < scored.dropped_failed
    assert len(index.refs) == len(scored.refs) + scored.dropped_failed
    collected = [ref for ref in index.refs if ref.iteration > 0]
    assert {(ref.reward, ref.advantage) for ref in collected} == {(0.0, 0.0)}
    loader = ScoredLoader(
        store, index, PromptEmbeddings(LetterPolicy()), batch_size=4, run_seed=0, iteration=3
    )
    assert loader.describe() == f"{loader.size} images ({index.by_source()})"
