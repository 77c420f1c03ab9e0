"""Votes that were given elsewhere become the votes that they are; what does not fit is counted, and nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.labelling.counting import verdicts
from diffexpo.labelling.foreign import import_votes
from diffexpo.labelling.making import Couple, add_couples, open_book
from tests.raters import PLAIN, make_book, png


def run_book(folder: Path):
    """Two prompts, three candidates each, of which two are asked about."""
    book = open_book(folder, "run", PLAIN, {})
    couples = [
        Couple(f"p{n}", f"prompt {n}", f"s{n}0", f"s{n}2", png(2 * n), png(2 * n + 1)) for n in range(2)
    ]
    add_couples(book, 1, couples, ["quality"], 1)
    book.set_facts({"candidates": [["s00", "s01", "s02"], ["s10", "s11", "s12"]]})
    return book


def counts(book) -> list[tuple[int, int, int]]:
    return [(one.wins_a, one.wins_b, one.ties) for one in verdicts(book)]


def test_a_table_may_name_images_in_either_order(tmp_path: Path) -> None:
    lines = [
        "rater,a,b,answer",
        "x,s00,s02,a",
        "y,s02,s00,a",
        "x,s10,s12,tie",
        "y,s12,s10,neither",
        "z,s10,s12,skip",
    ]
    (tmp_path / "votes.csv").write_text("\n".join(lines) + "\n")
    book = run_book(tmp_path / "book")
    done = import_votes(book, tmp_path / "votes.csv")
    assert counts(book) == [(1, 1, 0), (0, 0, 2)] and (done.votes, done.raters) == (5, {"x", "y", "z"})
    again = import_votes(book, tmp_path / "votes.csv")
    assert again.votes == 0 and again.dropped == {"given twice": 5} and counts(book) == [(1, 1, 0), (0, 0, 2)]


def test_rows_that_do_not_fit_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        {"rater": "x", "a": "s00", "b": "s99", "answer": "a"},
        {"rater": "x", "a": "s00", "b": "s02", "answer": "left-ish"},
        {"rater": "x", "answer": "a"},
        {"rater": "x", "item": "0001-000001-quality", "answer": "b"},
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = import_votes(run_book(tmp_path / "book"), tmp_path / "votes.jsonl")
    assert done.votes == 1
    assert dict(done.dropped) == {
        "on pairs that are not asked here": 1,
        "without an answer a, b, tie, neither or skip": 1,
        "naming neither an item nor images a and b": 1,
    }
    assert "1 votes of 1 raters; left out: 1 naming neither" in done.describe()


@pytest.mark.parametrize("rater", [0, 0.0, "0"])
def test_a_rater_is_the_same_as_a_number_and_as_a_text(tmp_path: Path, rater: object) -> None:
    row = {"rater": rater, "a": "s00", "b": "s02", "answer": "a"}
    (tmp_path / "votes.jsonl").write_text(json.dumps(row) + "\n")
    assert import_votes(run_book(tmp_path / "book"), tmp_path / "votes.jsonl").raters == {"0"}


def test_an_ambiguous_row_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "votes.csv").write_text("rater,a,b,answer\nx,one,two,a\n")
    done = import_votes(make_book(tmp_path / "book", pairs=2), tmp_path / "votes.csv")
    assert done.votes == 0 and done.dropped == {"that fit several questions": 1}


def test_label_studio(tmp_path: Path) -> None:
    """Its export: tasks with data and annotations; a choice by Pairwise or by Choices; a was on the left."""

    def pairwise(side: str) -> list[dict[str, object]]:
        return [{"from_name": "pw", "to_name": "left,right", "type": "pairwise", "value": {"selected": side}}]

    def choices(word: str) -> list[dict[str, object]]:
        return [{"from_name": "better", "to_name": "left", "type": "choices", "value": {"choices": [word]}}]

    tasks = [
        {
            "id": 1,
            "data": {"a": "s00", "b": "s02", "image1": "/data/1.png"},
            "annotations": [
                {"completed_by": 10, "was_cancelled": False, "result": pairwise("left")},
                {
                    "completed_by": {"id": 11, "email": "b@c.de"},
                    "was_cancelled": False,
                    "result": pairwise("right"),
                },
                {"completed_by": 12, "was_cancelled": True, "result": []},
                {"completed_by": 13, "was_cancelled": False, "result": []},
            ],
        },
        {
            "id": 2,
            "data": {"a": "s12", "b": "s10"},
            "annotations": [
                {"completed_by": 10, "result": choices("Left")},
                {"completed_by": 14, "result": choices("tie")},
            ],
        },
        {
            "id": 3,
            "data": {"a": "other", "b": "pair"},
            "annotations": [{"completed_by": 1, "result": choices("left")}],
        },
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    book = run_book(tmp_path / "book")
    done = import_votes(book, tmp_path / "export.json")
    assert counts(book) == [(1, 1, 0), (0, 1, 1)]
    assert dict(done.dropped) == {
        "without a choice of left, right, tie, neither or skip": 1,
        "on pairs that are not asked here": 1,
    }
    assert [one.skips for one in verdicts(book)] == [1, 0]


def test_d3po(tmp_path: Path) -> None:
    """A row of numbers for each prompt, one for each image: the larger is preferred."""
    (tmp_path / "data.json").write_text("[[1, 0, 0], [0.5, 1, 0.5]]")
    book = run_book(tmp_path / "book")
    assert import_votes(book, tmp_path / "data.json", "d3po").votes == 2
    assert counts(book) == [(1, 0, 0), (0, 0, 1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[[1, 0, 0]]", "1 rows, the collection has 2 prompts"),
        ("a.json", "[[1, 0], [1, 0]]", r"row 0 is \[1, 0\]; expected 3 numbers"),
        ("a.json", '[[1, 0, 0], [1, 0, "x"]]', "row 1"),
        ("a.json", "{}", "it holds neither"),
        ("a.json", "[]", "it holds neither"),
        ("a.json", "[1", "cannot be read"),
        ("a.csv", "rater,choice\nx,a\n", "no column answer"),
        ("a.jsonl", "[1]\n", "no JSON object"),
        ("a.jsonl", "{\n", "cannot be read"),
        ("a.csv", "\xff\xfe", "no column answer|cannot be read"),
    ],
)
def test_wrong_files_are_explained_and_change_nothing(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    book = run_book(tmp_path / "book")
    if text == "\xff\xfe":
        text = ""
    with pytest.raises(ImportFormatError, match=message):
        import_votes(book, tmp_path / name)
    assert not book.votes() and not book.raters()


def test_what_is_not_there_or_of_another_kind_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="expected a file of votes"):
        import_votes(run_book(tmp_path / "book"), tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("rater,answer\n")
    with pytest.raises(ImportFormatError, match="not of format d3po"):
        import_votes(run_book(tmp_path / "two"), tmp_path / "a.csv", "d3po")
    (tmp_path / "data.json").write_text("[[1, 0]]")
    with pytest.raises(ImportFormatError, match="belong to a run's collection"):
        import_votes(make_book(tmp_path / "study"), tmp_path / "data.json")
