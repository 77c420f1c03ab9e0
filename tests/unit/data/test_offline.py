"""Pick-a-Pic columns in, pairs out; everything dropped is counted; an import can die and go on."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from diffexpo.data.offline.formats import read_pickapic
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.offline.votes import ImportReport
from diffexpo.data.store import Store
from diffexpo.errors import ImportFormatError, Interrupted, MissingError, StoreError

from .conftest import LetterPolicy, jpeg, vote

Write = Callable[..., Path]


def test_the_winner_comes_first(write_votes: Write) -> None:
    rows = [vote(0, 1.0), vote(1, 0.0)]
    first, second = read_pickapic(write_votes(rows))
    assert (first.winner_jpg, first.loser_jpg) == (rows[0]["jpg_0"], rows[0]["jpg_1"])
    assert (second.winner_jpg, second.loser_jpg) == (rows[1]["jpg_1"], rows[1]["jpg_0"])
    assert (second.winner_model, second.winner_uid, second.caption) == ("two", "uid 1 1", "prompt 1")


def test_everything_dropped_is_counted(write_votes: Write) -> None:
    rows = [
        vote(0),
        vote(1, 0.5),
        vote(2, has_label=False),
        vote(3, has_label=False, label_0=0.5, label_1=0.5),
        vote(4, 0.7),
        vote(5, label_0=1.0, label_1=1.0),
        vote(6, label_0=None),
        vote(7, caption="  "),
        vote(8, jpg_0=b"not an image"),
        vote(9, jpg_1=jpeg(9, 1, size=(64, 64))[:700]),
        vote(10, jpg_1=None),
        vote(11, jpg_1=jpeg(11, 0)),
        vote(12, 0.0),
    ]
    report = ImportReport()
    pairs = list(read_pickapic(write_votes(rows), report))
    assert [pair.row for pair in pairs] == ["votes.parquet:0", "votes.parquet:12"]
    assert (report.read, report.kept, report.ties, report.unlabelled) == (13, 2, 1, 2)
    assert report.quarantined == {
        "labels are not 1/0, 0/1 or 0.5/0.5": 3, "no caption": 1, "not an image": 1, "truncated or damaged": 1,
        "no bytes": 1, "both images are the same": 1,
    }  # fmt: skip
    assert report.read == report.kept + report.ties + report.unlabelled + sum(report.quarantined.values())
    assert "votes.parquet:8: not an image" in report.examples and "1 ties" in report.describe()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label_0", "lable_0", "column 'label_0' is missing; the nearest present one is 'lable_0'"),
        ("caption", "prompt", "column 'caption' is missing; the nearest present one is"),
        ("jpg_1", "image_1", "column 'jpg_1' is missing; the nearest present one is 'jpg_0'"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, old: str, new: str, message: str) -> None:
    table = pa.Table.from_pylist([vote(0)])
    path = tmp_path / "votes.parquet"
    pq.write_table(table.rename_columns([new if name == old else name for name in table.column_names]), path)
    with pytest.raises(ImportFormatError, match=message):
        next(read_pickapic(path))


def test_a_column_of_the_wrong_type_is_named(write_votes: Write) -> None:
    with pytest.raises(ImportFormatError, match="column 'jpg_0' is of type string; expected binary"):
        next(read_pickapic(write_votes([vote(0, jpg_0="a.jpg")])))
    with pytest.raises(ImportFormatError, match="column 'label_1' is of type binary; expected a number"):
        next(read_pickapic(write_votes([vote(0, label_1=b"0")])))


def test_image_structs_of_the_datasets_library_are_read(write_votes: Write) -> None:
    row = vote(0)
    wrapped = row | {name: {"bytes": row[name], "path": None} for name in ("jpg_0", "jpg_1")}
    (pair,) = read_pickapic(write_votes([wrapped]))
    assert pair.winner_jpg == row["jpg_0"]


def test_integer_labels_and_absent_optional_columns_are_enough(write_votes: Write) -> None:
    core = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
    row = {name: vote(0)[name] for name in core} | {"label_0": 0, "label_1": 1}
    (pair,) = read_pickapic(write_votes([row]))
    assert pair.winner_jpg == row["jpg_1"] and pair.winner_model is None


def test_damaged_parquet_is_one_clear_error(write_votes: Write) -> None:
    path = write_votes([vote(n) for n in range(20)])
    whole = path.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ImportFormatError, match="votes.parquet is truncated or not Parquet"):
            list(read_pickapic(path))


def test_missing_sources_are_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        next(read_pickapic(tmp_path / "none.parquet"))
    with pytest.raises(MissingError, match=r"holds no .parquet file"):
        next(read_pickapic(tmp_path))


def test_a_limit_chooses_by_key_among_labelled_rows(write_votes: Write) -> None:
    path = write_votes([vote(n, 0.5 if n % 3 == 0 else 1.0) for n in range(60)])
    chosen = {seed: [pair.row for pair in read_pickapic(path, limit=10, seed=seed)] for seed in (0, 1)}
    assert len(chosen[0]) == 10 and chosen[0] != chosen[1]
    assert chosen[0] == [pair.row for pair in read_pickapic(path, limit=10, seed=0)]
    small = [pair.row for pair in read_pickapic(path, limit=5, seed=0)]
    assert set(small) < set(chosen[0])


def test_an_import_encodes_each_picture_once(
    write_votes: Write, tmp_path: Path, policy: LetterPolicy
) -> None:
    shared = jpeg("shared")
    rows = [vote(n, caption="a cat", jpg_0=shared) for n in range(7)]
    store = Store(tmp_path / "store")
    report = import_offline(write_votes(rows), policy, store, unit_pairs=3)
    assert report.kept == 7 and policy.encoded_images == 8 == len(store.samples(0))
    pairs = store.pairs(source="offline")
    assert len({pair.winner_id for pair in pairs}) == 1 and len({pair.pair_id for pair in pairs}) == 7
    pixels = np.array(Image.open(io.BytesIO(shared)).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_array_equal(store.latent(str(pairs[0].winner_id)), pixels * 2 - 1)


def test_an_import_is_idempotent_and_resumes_to_the_same_bytes(
    write_votes: Write, tmp_path: Path, policy: LetterPolicy
) -> None:
    path = write_votes([vote(n, jpg_1=b"broken" if n % 5 == 0 else jpeg(n, 1)) for n in range(20)])
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    report = import_offline(path, policy, whole, unit_pairs=4)
    calls: list[None] = []

    def die_after_two() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("a signal arrived")

    with pytest.raises(Interrupted):
        import_offline(path, policy, broken, unit_pairs=4, tick=die_after_two)
    (tmp_path / "broken" / "latents-0000-offline-r00-u0002.safetensors").write_bytes(b"half")
    assert not broken.is_complete("offline", 0)
    before = policy.encoded_images
    resumed = import_offline(path, policy, Store(tmp_path / "broken"), unit_pairs=4)
    assert (
        resumed == report
        and policy.encoded_images - before < 32
        and report.quarantined == {"not an image": 4}
    )
    again = import_offline(path, policy, whole, unit_pairs=4)
    assert again == report and policy.encoded_images - before < 32
    contents = [{p.name: p.read_bytes() for p in store.root.rglob("*.*")} for store in (whole, broken)]
    assert contents[0] == contents[1]


def test_another_set_or_model_does_not_enter_the_same_store(
    write_votes: Write, tmp_path: Path, policy: LetterPolicy
) -> None:
    path = write_votes([vote(n) for n in range(3)])
    store = Store(tmp_path / "store")
    import_offline(path, policy, store)
    with pytest.raises(StoreError, match="holds another offline set: files differ"):
        import_offline(write_votes([vote(n) for n in range(4)]), policy, store)
    with pytest.raises(StoreError, match="holds another offline set: limit differ"):
        import_offline(write_votes([vote(n) for n in range(3)]), policy, store, limit=2)


def test_long_captions_are_quarantined_and_nothing_left_is_an_error(
    write_votes: Write, tmp_path: Path, policy: LetterPolicy
) -> None:
    path = write_votes([vote(0), vote(1, caption="word " * 100)])
    report = import_offline(path, policy, Store(tmp_path / "a"), accepts_prompt=lambda text: len(text) < 50)
    assert report.quarantined == {"prompt too long": 1} and report.kept == 1
    with pytest.raises(ImportFormatError, match="gave no pair to learn from: 0 pairs of 2 rows"):
        import_offline(path, policy, Store(tmp_path / "b"), accepts_prompt=lambda text: False)


def test_pictures_of_other_sizes_are_fitted(write_votes: Write, tmp_path: Path, policy: LetterPolicy) -> None:
    store = Store(tmp_path / "store")
    import_offline(write_votes([vote(0, jpg_0=jpeg("big", size=(40, 20)))]), policy, store)
    assert store.latents([row.sample_id for row in store.samples(0)]).shape == (2, 3, 8, 8)


class Threads:
    """Processes that are threads of this one, each with a store of its own on the same folder."""

    def __init__(self, rank: int, door: threading.Barrier, shared: dict[int, list[object]]) -> None:
        self.rank, self.size, self._door, self._shared = rank, door.parties, door, shared

    def barrier(self) -> None:
        self._door.wait(60)

    def gather_objects(self, items: list[object]) -> list[object]:
        self._shared[self.rank] = items
        self.barrier()
        everybody = [item for rank in range(self.size) for item in self._shared[rank]]
        self.barrier()
        return everybody


class SlowPolicy(LetterPolicy):
    def encode_images(self, images: Tensor) -> Tensor:
        time.sleep(0.1)
        return super().encode_images(images)


def test_a_pair_may_have_an_image_that_another_process_stores_at_the_same_time(
    write_votes: Write, tmp_path: Path
) -> None:
    """Three images of a prompt, every two of them a pair, as `scenes:offline` has them."""
    images = [jpeg(0, number) for number in range(3)]
    sides = [(0, 1), (0, 2), (1, 2)] * 2
    rows = [
        vote(number, caption=f"prompt {number // 3}", jpg_0=images[a], jpg_1=images[b])
        for number, (a, b) in enumerate(sides)
    ]
    source, door, shared = write_votes(rows), threading.Barrier(2), {}
    alone = Store(tmp_path / "alone")
    import_offline(source, LetterPolicy(), alone, unit_pairs=1)

    def work(rank: int) -> ImportReport:
        store = Store(tmp_path / "both")
        world = Threads(rank, door, shared)
        policy = SlowPolicy() if rank == 0 else LetterPolicy()
        return import_offline(source, policy, store, unit_pairs=1, world=world)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    both = Store(tmp_path / "both", create=False)
    assert first == second and first.kept == 6
    assert sorted(pair.pair_id for pair in both.pairs()) == sorted(pair.pair_id for pair in alone.pairs())
    names = sorted(sample.sample_id for sample in alone.samples())
    assert sorted(sample.sample_id for sample in both.samples()) == names and len(names) == 6
    assert np.array_equal(both.latents(names), alone.latents(names))
