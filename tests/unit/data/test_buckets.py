"""Pictures of several sizes in one store: which size a pair gets, what is stored of it, and how batches read it back."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffexpo.bounded.images import whole_image
from diffexpo.config.schema import HybridConfig
from diffexpo.data.export import export_pairs
from diffexpo.data.images import fit_image, nearest_size
from diffexpo.data.latents import PromptEmbeddings, encode_images, image_sizes, pixel_decoder
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.pairs import PairLoader, pair_index
from diffexpo.data.scored import ScoredLoader, ScoredSource
from diffexpo.data.statistics import summarise_store
from diffexpo.data.store import Store
from diffexpo.errors import Interrupted, StoreError
from diffexpo.training.batches import micro_batches
from diffexpo.types import MixedRows
from tests.rows import sample_row

from .conftest import LetterPolicy, jpeg, vote

Write = Callable[..., Path]
SQUARE, WIDE, TALL = (8, 8), (6, 10), (10, 6)


class BucketPolicy(LetterPolicy):
    """One latent is one pixel, so shapes are sizes."""

    latent_shapes = ((3, *SQUARE), (3, *WIDE), (3, *TALL))


@pytest.fixture
def policy() -> BucketPolicy:
    return BucketPolicy()


def votes() -> list[dict[str, object]]:
    """Winners wide, tall, square, wide, tall, square, ...; each loser has the shape of the next winner."""
    sizes = [(20, 12), (9, 15), (11, 11)]
    return [
        vote(n, jpg_0=jpeg(n, 0, size=sizes[n % 3]), jpg_1=jpeg(n, 1, size=sizes[(n + 1) % 3]))
        for n in range(12)
    ]


@pytest.mark.parametrize(
    ("picture", "nearest"),
    [
        ((30, 20), WIDE), ((20, 30), TALL), ((10, 10), SQUARE), ((1000, 10), WIDE), ((10, 9), SQUARE),
        # Halfway in log ratio between 1 and 10/6 lies sqrt(10/6) = 1.291.
        ((1290, 1000), SQUARE), ((1292, 1000), WIDE), ((1000, 1290), SQUARE), ((1000, 1292), TALL),
    ],
)  # fmt: skip
def test_the_nearest_size_is_nearest_in_log_ratio(picture: tuple[int, int], nearest: tuple[int, int]) -> None:
    assert nearest_size(Image.new("RGB", picture), (SQUARE, WIDE, TALL)) == nearest


def test_of_two_sizes_as_near_the_first_is_taken() -> None:
    for sizes in ((WIDE, TALL), (TALL, WIDE)):
        assert nearest_size(Image.new("RGB", (5, 5)), sizes) == sizes[0]


def test_a_pair_has_the_size_of_its_winner_and_a_loser_loses_its_borders(
    write_votes: Write, tmp_path: Path, policy: BucketPolicy
) -> None:
    assert image_sizes(policy) == (SQUARE, WIDE, TALL)
    store = Store(tmp_path / "store")
    rows = votes()
    report = import_offline(write_votes(rows), policy, store, unit_pairs=5)
    assert report.sizes == {"6x10": 4, "10x6": 4, "8x8": 4}
    assert (
        "12 pairs of 12 rows" in report.describe() and "4 at 10x6, 4 at 6x10, 4 at 8x8" in report.describe()
    )
    assert store.manifest("offline", 0)["report"]["sizes"] == report.sizes
    assert summarise_store(store)["samples by size"] == {"6x10": 8, "10x6": 8, "8x8": 8}
    for number, pair in enumerate(sorted(store.pairs(), key=lambda row: int(row.pair_id.split(":")[1]))):
        size = (WIDE, TALL, SQUARE)[number % 3]
        for side, name in (("jpg_0", "winner_id"), ("jpg_1", "loser_id")):
            sample = store.sample(getattr(pair, name))
            assert (sample.height, sample.width) == size
            with whole_image(rows[number][side]) as image:
                fitted = fit_image(image, *size)
            expected = fitted.transpose(2, 0, 1).astype(np.float32) / 255 * 2 - 1
            np.testing.assert_array_equal(store.latent(getattr(pair, name)), expected)
    assert store.sizes() == {row.sample_id: (row.height, row.width) for row in store.samples(0)}
    assert store.verify() > 0


def test_a_stopped_import_goes_on_to_the_same_bytes_and_counts(
    write_votes: Write, tmp_path: Path, policy: BucketPolicy
) -> None:
    path = write_votes(votes())
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    report = import_offline(path, policy, whole, unit_pairs=4)
    calls: list[None] = []

    def die() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("a signal arrived")

    with pytest.raises(Interrupted):
        import_offline(path, policy, broken, unit_pairs=4, tick=die)
    assert import_offline(path, policy, Store(broken.root), unit_pairs=4) == report
    assert import_offline(path, policy, whole, unit_pairs=4) == report
    contents = [{p.name: p.read_bytes() for p in store.root.rglob("*.*")} for store in (whole, broken)]
    assert contents[0] == contents[1]


def test_other_sizes_do_not_enter_the_same_store(
    write_votes: Write, tmp_path: Path, policy: BucketPolicy
) -> None:
    path = write_votes(votes())
    several, one = Store(tmp_path / "several"), Store(tmp_path / "one")
    import_offline(path, policy, several)
    import_offline(path, LetterPolicy(), one)
    fewer = BucketPolicy()
    fewer.latent_shapes = policy.latent_shapes[:2]
    for other in (fewer, LetterPolicy()):
        with pytest.raises(StoreError, match="holds another offline set: buckets differ"):
            import_offline(path, other, several)
    with pytest.raises(StoreError, match="holds another offline set: buckets differ"):
        import_offline(path, policy, one)


def test_one_picture_in_pairs_of_two_sizes_is_stored_at_both(
    write_votes: Write, tmp_path: Path, policy: BucketPolicy
) -> None:
    shared = jpeg("shared", size=(20, 12))
    rows = [
        vote(0, caption="a cat", jpg_0=shared, jpg_1=jpeg("x", size=(9, 9))),
        vote(1, caption="a cat", jpg_0=jpeg("y", size=(9, 9)), jpg_1=shared),
        vote(2, caption="a cat", jpg_0=jpeg("z", size=(18, 10)), jpg_1=shared),
    ]
    store = Store(tmp_path / "store")
    import_offline(write_votes(rows), policy, store)
    first, second, third = store.pairs()
    assert first.winner_id == third.loser_id != second.loser_id
    assert store.sizes()[first.winner_id] == WIDE and store.sizes()[second.loser_id] == SQUARE
    assert len(store.samples(0)) == 5


def test_a_set_of_one_size_is_named_as_without_sizes(write_votes: Write, tmp_path: Path) -> None:
    """Names, manifest and origin of a run without buckets have nothing of them."""
    store = Store(tmp_path / "store")
    report = import_offline(write_votes([vote(0)]), LetterPolicy(), store)
    assert report.sizes == {} and "height" not in report.describe()
    manifest = store.manifest("offline", 0)
    assert "buckets" not in manifest["origin"] and "sizes" not in manifest["report"]


def test_pictures_are_encoded_in_batches_of_one_size_and_come_back_in_order(policy: BucketPolicy) -> None:
    generator = np.random.default_rng(0)
    sizes = [SQUARE, WIDE, SQUARE, TALL, WIDE, SQUARE]
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    found = encode_images(policy, pictures, 2)
    for picture, latents in zip(pictures, found, strict=True):
        np.testing.assert_array_equal(latents, picture.transpose(2, 0, 1).astype(np.float32) / 255 * 2 - 1)
    assert encode_images(policy, [], 2) == []


# ---- reading ---------------------------------------------------------------------------------------------------


def test_latents_of_several_shapes_come_as_stretches(tmp_path: Path) -> None:
    store = Store(tmp_path)
    arrays = {name: np.full((3, *size), number, np.float32) for number, (name, size) in enumerate(
        {"a": SQUARE, "b": SQUARE, "c": WIDE, "d": TALL}.items()
    )}  # fmt: skip
    store.append_unit(1, 0, 0, [sample_row(name) for name in arrays], list(arrays.values()))
    found = store.stretches(["b", "a", "c", "c", "d", "a"])
    assert [part.shape for part in found] == [(2, 3, 8, 8), (2, 3, 6, 10), (1, 3, 10, 6), (1, 3, 8, 8)]
    assert [part[:, 0, 0, 0].tolist() for part in found] == [[1, 0], [2, 2], [3], [0]]
    assert store.latents(["c", "c"]).shape == (2, 3, 6, 10)
    with pytest.raises(StoreError, match="'c' are float32 .3, 6, 10., those of 'a' are float32 .3, 8, 8."):
        store.latents(["a", "c"])


@pytest.fixture
def store(write_votes: Write, tmp_path: Path, policy: BucketPolicy) -> Store:
    store = Store(tmp_path / "store")
    import_offline(write_votes(votes()), policy, store)
    return store


def test_batches_hold_pairs_of_one_size_behind_each_other(store: Store, policy: BucketPolicy) -> None:
    sizes = store.sizes()
    index = pair_index(store, HybridConfig(), 1)
    loader = PairLoader(
        store, index, PromptEmbeddings(policy), batch_size=8, run_seed=0, iteration=1, sizes=sizes
    )
    plain = PairLoader(store, index, PromptEmbeddings(policy), batch_size=8, run_seed=0, iteration=1)
    for step in range(3):
        batch = loader.batch(step)
        drawn = [row.ref for row in loader.draws.batch(step)]
        # The same pairs as without an order, and no shape twice.
        assert sorted(batch.keys) == sorted(
            f"{row.ref.pair_id}@{row.epoch}" for row in plain.draws.batch(step)
        )
        assert isinstance(batch.winner, MixedRows) and len(batch.winner.parts) == 3
        assert batch.winner.borders == batch.loser.borders
        for row, ref in enumerate(drawn):
            for rows, name in ((batch.winner, ref.winner_id), (batch.loser, ref.loser_id)):
                np.testing.assert_array_equal(rows[row : row + 1].numpy()[0], store.latent(name))
        for part, _ in micro_batches(batch, 3):
            assert part.winner.shape == part.loser.shape


def test_offline_groups_of_scored_images_have_one_size(
    write_votes: Write, tmp_path: Path, policy: BucketPolicy
) -> None:
    """DGPO's images of a group share their noise; the pairs of one prompt may have several sizes."""
    store = Store(tmp_path / "one_prompt")
    import_offline(write_votes([row | {"caption": "a cat"} for row in votes()]), policy, store)
    sizes = store.sizes()
    source = ScoredSource(
        store,
        HybridConfig(),
        lambda scores: scores["judge"],
        lambda rewards, groups: rewards - 0.5,
        sizes=sizes,
    )
    index = source.index(1)
    groups: dict[int, set[tuple[int, int]]] = {}
    for ref in index.refs:
        groups.setdefault(ref.group, set()).add(sizes[ref.sample_id])
    assert sorted(groups.values(), key=sorted) == [{WIDE}, {SQUARE}, {TALL}]
    loader = ScoredLoader(
        store,
        index,
        PromptEmbeddings(policy),
        batch_size=24,
        run_seed=0,
        iteration=1,
        whole_groups=True,
        sizes=sizes,
    )
    batch = loader.batch(0)
    assert isinstance(batch.latents, MixedRows) and len(batch.latents.parts) == 3 and len(batch) == 24
    parts = [part for part, _ in micro_batches(batch, 4)]
    assert [len(part) for part in parts] == [8, 8, 8]
    assert all(len(set(part.groups.tolist())) == 1 for part in parts)


def test_exported_pictures_keep_their_sizes(store: Store, policy: BucketPolicy, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    export_pairs(store, tmp_path / "out.parquet", pixel_decoder(policy))
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        for side in (0, 1):
            picture = Image.open(io.BytesIO(row[f"jpg_{side}"]))
            assert (picture.height, picture.width) == (row["height"], row["width"])
    assert {(row["height"], row["width"]) for row in pq.read_table(tmp_path / "out.parquet").to_pylist()} == {
        SQUARE, WIDE, TALL
    }  # fmt: skip
