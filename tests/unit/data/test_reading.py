"""Rows of foreign text files: exactly what the standard library reads, in pieces, and damage in its place."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.bounded.images import verify_image
from diffexpo.data.offline import reading
from diffexpo.data.offline.reading import Damage, csv_rows, json_lines, json_list, parquet_rows
from diffexpo.data.offline.sources import read_image
from diffexpo.errors import ImportFormatError

from .conftest import jpeg


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("piece", [1, 7, 2**16])
def test_a_json_list_is_read_in_pieces_as_json_reads_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    monkeypatch.setattr(reading, "_CHUNK", piece)
    draw = random.Random(piece)
    values = [
        {
            "prompt": 'caf\u00e9 \u2028 \U0001f600 [,]{}"',
            "n": [draw.random() for _ in range(draw.randrange(9))],
            "d": {"x": None},
        }
        for _ in range(20)
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=indent), encoding="utf-8-sig")
    assert [value for _, value in json_list(path)] == values
    path.write_text("[ ]")
    assert list(json_list(path)) == []


@pytest.mark.parametrize(
    "text", ['[{"a": 1} {"b": 2}]', '[{"a": 1}, {"b": }]', '[{"a": 1},]', '[{"a": 1}, x]', '[{"a": 1}]]']
)
def test_json_that_breaks_off_gives_what_stands_before(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    rows = [row for _, row in json_list(path)]
    assert rows[0] == {"a": 1}
    assert len(rows) == 1 if text.endswith("]]") else isinstance(rows[-1], Damage) and len(rows) == 2


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": 1}', "is not a JSON list"), ('[{"a": 1}, {"b"', "is truncated")]
)
def test_what_is_no_whole_list_is_refused_first(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ImportFormatError, match=message):
        next(json_list(path))


def test_bad_lines_stay_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = [row.reason if isinstance(row, Damage) else row for _, row in json_lines(path)]
    assert rows == [{"a": 1}, "not JSON", "not a JSON object", "text is not UTF-8", {"a": 2}]
    table = tmp_path / "rows.csv"
    table.write_bytes(b'a,b\n1,"x\ny"\n2\n3,caf\xe9\n4,"un"closed\n5,z\n')
    found = [row.reason if isinstance(row, Damage) else row for _, row in csv_rows(table)]
    assert found == [
        {"a": "1", "b": "x\ny"}, "not one cell a column", "text is not UTF-8", "not CSV", {"a": "5", "b": "z"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", "leaves the folder"),
        ("a/../../secret.jpg", "leaves the folder"),
        ("/etc/hostname", "leaves the folder"),
        ("C:\\secret.jpg", "leaves the folder"),
        ("..\\secret.jpg", "leaves the folder"),
        ("link.jpg", "leaves the folder"),
        ("folder/secret.jpg", "leaves the folder"),
        ("http://example.org/a.jpg", "is a URL"),
        ("data:image/jpeg;base64,AAAA", "is a URL"),
        ("none.jpg", "is missing"),
        ("a.jpg/b.jpg", "is missing"),
        ("inner", "cannot be opened"),
        ("", "no picture is named"),
        (3, "no picture is named"),
    ],
)
def test_nothing_outside_the_folder_is_opened(tmp_path: Path, name: object, reason: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    root = tmp_path / "set"
    (root / "inner").mkdir(parents=True)
    (root / "a.jpg").write_bytes(jpeg(1))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    (root / "inside.jpg").symlink_to(root / "a.jpg")
    for inside in ("a.jpg", "inside.jpg", "./a.jpg"):
        assert read_image(root, inside) == jpeg(1)
    with pytest.raises(ImportFormatError, match=reason):
        read_image(root, name)


def test_verifying_decodes_every_byte() -> None:
    data = jpeg("x", size=(64, 64))
    verify_image(data)
    for cut in (10, len(data) // 2, len(data) - 100):
        with pytest.raises(ImportFormatError):
            verify_image(data[:cut])


def pictures_table(rows: int) -> pa.Table:
    """Rows of two pictures, of which every fifth repeats the one before: a writer keeps such columns in a dictionary."""
    draw = random.Random(0)
    pictures = [draw.randbytes(40_000) for _ in range(rows)]
    return pa.table(
        {
            "caption": [f"thing {number}" for number in range(rows)],
            "jpg_0": [pictures[number - number % 5 // 4] for number in range(rows)],
            "jpg_1": pictures[::-1],
            "label_0": [float(number % 2) for number in range(rows)],
        }
    )


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("start", [0, 33])
def test_rows_of_narrow_and_wide_columns_are_those_of_the_table(
    tmp_path: Path, dictionary: bool, start: int
) -> None:
    table = pictures_table(150)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=70, use_dictionary=dictionary)
    assert list(parquet_rows(path, table.column_names, start)) == list(enumerate(table.to_pylist()))[start:]
    assert (
        list(parquet_rows(path, ["label_0"], start))
        == list(enumerate(table.select(["label_0"]).to_pylist()))[start:]
    )
    assert [row for _, row in parquet_rows(path, [], start)] == [{}] * (150 - start)


def test_a_picture_that_a_dictionary_repeats_is_not_in_memory_for_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    picture = random.Random(0).randbytes(8_000_000)
    pq.write_table(pa.table({"jpg_0": [picture] * 24, "label_0": list(range(24))}), path)
    before = pa.default_memory_pool().max_memory()
    assert [row["label_0"] for _, row in parquet_rows(path, ["jpg_0", "label_0"])] == list(range(24))
    assert pa.default_memory_pool().max_memory() - before < 64_000_000


def test_damage_in_a_wide_column_leaves_the_rows_before_it(tmp_path: Path) -> None:
    table = pictures_table(60)
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=20, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(1)
    place = group.column(group.num_columns - 2).dictionary_page_offset + 5000
    data[place : place + 100] = bytes(100)
    path.write_bytes(data)
    rows = list(parquet_rows(path, table.column_names))
    assert rows[:20] == list(enumerate(table.to_pylist()))[:20]
    assert rows[20] == (20, Damage("damaged Parquet: these rows do not decode", 20))
    assert rows[21:] == list(enumerate(table.to_pylist()))[40:]
