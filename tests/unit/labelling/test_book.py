"""The book: what is refused in words, and that it loads without torch."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from diffexpo.errors import ConfigError, MissingError, StoreError
from diffexpo.labelling import book as book_module
from diffexpo.labelling.asking import answer, open_tasks, undo
from diffexpo.labelling.book import Book
from tests.raters import answer_all, careful, join, make_book


def test_votes_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with make_book(tmp_path) as book:
        answer_all(book, join(book, "ann")[0], careful("one"))
        before = book.votes()
    with Book(tmp_path) as again:
        assert again.votes() == before and len(before) == 4
        assert again.rows("PRAGMA journal_mode") == [("wal",)] and again.rows("PRAGMA synchronous") == [(2,)]
        assert {vote.preference for vote in before} == {1.0}


def test_a_folder_without_a_book_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nothing to rate.*type human.*study new"):
        Book(tmp_path)


def test_a_damaged_file_is_explained(tmp_path: Path) -> None:
    make_book(tmp_path).close()
    (tmp_path / "labels.sqlite").write_bytes(b"not a database, but long enough to look at" * 50)
    for extra in ("labels.sqlite-wal", "labels.sqlite-shm"):
        (tmp_path / extra).unlink(missing_ok=True)
    with pytest.raises(StoreError, match="damaged.*restore it"):
        Book(tmp_path)


def test_a_book_of_another_format_is_refused(tmp_path: Path) -> None:
    with make_book(tmp_path) as book:
        book.set_facts({"format": 99})
    with pytest.raises(StoreError, match="format 99, this version reads 1"):
        Book(tmp_path)


def test_a_locked_book_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_module, "_BUSY_S", 0.05)
    book = make_book(tmp_path)
    other = sqlite3.connect(tmp_path / "labels.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked.*another process holds it"):
        book.set_facts({"state": "stopped"})
    other.execute("ROLLBACK")
    book.set_facts({"state": "stopped"})


def test_a_full_disk_is_explained_and_nothing_is_half_written(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    book.rows(f"PRAGMA max_page_count = {book.rows('PRAGMA page_count')[0][0]}")
    with pytest.raises(StoreError, match="full.*free space"):
        book.set_facts({f"fact {number}": "x" * 1000 for number in range(200)})
    assert book.fact("fact 0") is None


def test_a_changed_or_missing_image_is_named(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    book.verify_images()
    path = book.image_path(book.items()[0].image_a)
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(StoreError, match=f"{path.name} has changed"):
        book.verify_images()
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        book.verify_images()


def test_questions_come_all_or_none(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    items = book.items()
    with pytest.raises(sqlite3.IntegrityError):
        book.add_items([*items[:1], *items])
    assert book.items() == items
    with pytest.raises(ConfigError, match="expected 1 or more"):
        book.more_votes(0)


def test_the_room_loads_without_torch() -> None:
    modules = "app, asking, book, counting, export, foreign, limits, links, making, pages, serving"
    code = f"from diffexpo.labelling import {modules}; import sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_what_follows_from_the_votes_always_does(tmp_path: Path) -> None:
    """Counts that triggers keep are those that a count of the votes gives, whatever was answered and taken back."""
    book = make_book(tmp_path, pairs=8, wanted=3)
    chance = random.Random(0)
    raters = [join(book, f"r{number}")[0].rater for number in range(3)]
    for _ in range(150):
        rater = chance.choice(raters)
        if chance.random() < 0.3:
            undo(book, rater)
        elif tasks := open_tasks(book, rater):
            answer(book, rater, tasks[0].task, chance.choice(["left", "right", "tie", "neither", "skip"]))
    given = Counter(vote.item for vote in book.votes() if vote.kind == "vote" and vote.answer != "skip")
    assert {item: count for item, count in book.rows("SELECT item, given FROM items") if count} == dict(given)
    answered = {task for (task,) in book.rows("SELECT task FROM votes WHERE undone IS NULL")}
    assert {task for (task,) in book.rows("SELECT task FROM tasks WHERE NOT is_open")} == answered
    assert (
        max(given.values()) <= 3
        and book.rows("SELECT count(*) FROM votes WHERE undone IS NOT NULL")[0][0] > 5
    )
