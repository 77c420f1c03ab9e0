"""A cell means the same whatever type its format gave it, and a set is read alike in all of them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.data.offline.cells import is_false, number_of, text_of_id
from diffexpo.data.offline.formats import read_offline
from diffexpo.data.offline.votes import ImportReport, OfflinePair
from diffexpo.data.prompts import load_prompts

from .conftest import jpeg

ONES = [1, 1.0, True, "1", "1.0", Decimal("1.00")]
ZEROS = [0, 0.0, False, "0", "0.0", Decimal(0)]


def test_numbers_are_read_from_every_type() -> None:
    assert [number_of(value) for value in ONES + ZEROS] == [1.0] * 6 + [0.0] * 6
    assert [number_of(value) for value in (None, "", "many", float("nan"), "inf", b"1", [1])] == [None] * 7


def test_only_what_says_no_is_false() -> None:
    assert all(map(is_false, [*ZEROS, "False", " no "]))
    assert not any(map(is_false, [*ONES, None, "", "yes"]))


def test_ids_are_texts_without_a_trace_of_their_type() -> None:
    assert [text_of_id(value) for value in (7, 7.0, "7", Decimal(7), 0)] == ["7", "7", "7", "7", "0"]
    assert [text_of_id(value) for value in (None, "", True, 7.5, float("nan"), b"7")] == [None] * 6


def pairs_of(path: Path) -> tuple[list[OfflinePair], ImportReport]:
    report = ImportReport()
    return list(read_offline(path, report)), report


COLUMNS = {
    "as they are": {},
    "categories of pandas": {"caption": pa.array(["a", "b", "c"]).dictionary_encode()},
    "labels that are true or false": {"label_0": pa.array([True, False, True]), "label_1": pa.array([False, True, False])},
    "decimal labels": {"label_0": pa.array([Decimal("1.0"), Decimal("0.0"), Decimal("1.0")])},
    "labels as text": {"label_0": pa.array(["1.0", "0.0", "1.0"]), "label_1": pa.array(["0", "1", "0"])},
    "has_label as integer": {"has_label": pa.array([1, 1, 0])},
    "has_label as float": {"has_label": pa.array([1.0, None, 0.0])},
    "has_label as text": {"has_label": pa.array(["True", "1", "False"])},
    "integer ids": {"image_0_uid": pa.array([0, 10, 20]), "image_1_uid": pa.array([1, 11, 21]), "best_image_uid": pa.array([0, 11, 20])},
    "images by path": {"jpg_0": pa.array([{"bytes": None, "path": f"{n}-0.jpg"} for n in range(3)])},
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_another_type_is_learned_from_alike(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}-0.jpg").write_bytes(jpeg(number, 0))
    columns = {
        "caption": pa.array(["a", "b", "c"]),
        "jpg_0": pa.array([jpeg(number, 0) for number in range(3)]),
        "jpg_1": pa.array([jpeg(number, 1) for number in range(3)]),
        "label_0": pa.array([1.0, 0.0, 1.0]),
        "label_1": pa.array([0.0, 1.0, 0.0]),
        "has_label": pa.array([True, True, False]),
    }
    pq.write_table(pa.table(columns | COLUMNS[kind]), tmp_path / "votes.parquet")
    pairs, report = pairs_of(tmp_path / "votes.parquet")
    assert [(pair.caption, pair.winner_jpg) for pair in pairs] == [("a", jpeg(0, 0)), ("b", jpeg(1, 1))]
    assert (report.unlabelled, report.quarantined) == (1, {})


def test_an_id_of_zero_is_an_id_and_may_name_the_loser(tmp_path: Path) -> None:
    row = {"caption": "a", "jpg_0": jpeg(0, 0), "jpg_1": jpeg(0, 1), "label_0": 1, "label_1": 0}
    ids = {"image_0_uid": 5, "image_1_uid": 0}
    for name, best in (("right", 5), ("wrong", 0)):
        table = pa.Table.from_pylist([row | ids | {"best_image_uid": best}])
        pq.write_table(table, tmp_path / f"{name}.parquet")
    pairs, _ = pairs_of(tmp_path / "right.parquet")
    assert [(pair.winner_uid, pair.loser_uid) for pair in pairs] == [("5", "0")]
    _, report = pairs_of(tmp_path / "wrong.parquet")
    assert report.quarantined == {"best_image_uid names the loser": 1}


def test_csv_jsonl_and_parquet_say_the_same_who_won(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "image_0": "0.jpg", "image_1": "1.jpg", "preferred": 1.0}]
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "t.csv").write_text("prompt,image_0,image_1,preferred\na,0.jpg,1.jpg,1.0\n")
    (tmp_path / "t.jsonl").write_text(
        '{"prompt": "a", "image_0": "0.jpg", "image_1": "1.jpg", "preferred": 1.0}\n'
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [pairs_of(tmp_path / f"t.{kind}")[0][0] for kind in ("csv", "jsonl", "parquet")]
    assert [pair.winner_jpg for pair in found] == [jpeg(1)] * 3


def test_prompts_keep_ids_and_categories_of_every_type(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a cat", "a dog"]).dictionary_encode(),
            "id": [1, 2],
            "category": pa.array(["pets", "pets"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    lines = (
        '{"prompt": "a cat", "id": 1, "category": "pets"}\n{"prompt": "a dog", "id": 2, "category": "pets"}\n'
    )
    (tmp_path / "p.jsonl").write_text(lines)
    found = [load_prompts(tmp_path / name) for name in ("p.parquet", "p.jsonl")]
    assert found[0] == found[1]
    assert [(one.id, one.category) for one in found[0]] == [("1", "pets"), ("2", "pets")]
