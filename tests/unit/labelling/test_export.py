"""Exported votes: no names, no times, the same in all formats, and read back to the same votes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffexpo.config.people import RatingConfig
from diffexpo.data.answers import ANSWERS_SCHEMA
from diffexpo.errors import ConfigError
from diffexpo.labelling.counting import verdicts
from diffexpo.labelling.export import COLUMNS, anonymous_rows, export_votes
from diffexpo.labelling.foreign import import_votes
from tests.raters import answer_all, careful, careless, join, make_book


def rated(folder: Path):
    book = make_book(folder, pairs=6, wanted=3, rating=RatingConfig(checks_every=3, repeats_every=4))
    for name, judge in (("Ann", careful("one")), ("Bob", careful("two")), ("Cara", careless(1))):
        answer_all(book, join(book, name)[0], judge)
    return book


def test_no_name_and_no_time_of_day_is_in_any_format(tmp_path: Path) -> None:
    book = rated(tmp_path / "book")
    for ending in ("csv", "jsonl", "parquet"):
        target = tmp_path / f"votes.{ending}"
        assert export_votes(book, target) == len(book.votes())
        data = target.read_bytes()
        for secret in (b"Ann", b"Bob", b"Cara", str(int(book.votes()[0].at))[:6].encode()):
            assert secret not in data


def test_all_formats_hold_the_same(tmp_path: Path) -> None:
    book = rated(tmp_path / "book")
    rows = anonymous_rows(book)
    for ending in ("csv", "jsonl", "parquet"):
        export_votes(book, tmp_path / f"votes.{ending}")
    assert pq.read_table(tmp_path / "votes.parquet").to_pylist() == rows
    assert [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()] == rows
    with (tmp_path / "votes.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["answer"] for row in read] == [row["answer"] for row in rows]
    assert list(read[0]) == list(COLUMNS) == ANSWERS_SCHEMA.names
    assert {row["answer"] for row in rows if row["kind"] == "check"} <= {"a", "b"}


def test_a_file_without_a_known_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with \.csv, \.jsonl or \.parquet"):
        export_votes(rated(tmp_path), tmp_path / "votes.xlsx")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_exported_votes_read_back_to_the_same_verdicts(ending: str, tmp_path: Path) -> None:
    book = rated(tmp_path / "book")
    export_votes(book, tmp_path / f"votes.{ending}")
    other = make_book(tmp_path / "other", pairs=6, wanted=3)
    done = import_votes(other, tmp_path / f"votes.{ending}")
    counts = [(one.wins_a, one.wins_b, one.ties) for one in verdicts(book)]
    assert counts == [(one.wins_a, one.wins_b, one.ties) for one in verdicts(other)]
    assert done.votes == 18 and len(done.raters) == 3 and done.dropped["checks and repeats"] > 0
