"""The book of a rating: what is asked, who may answer, and every answer, in one SQLite file beside its
images.

    labels.sqlite     facts, images, items, raters, tasks, votes
    images/           what is shown, under random names

A vote is acknowledged after its transaction is on the disk (write-ahead log, synchronous = FULL), so
neither a killed server nor a power cut takes it back. Nothing is overwritten: an answer that was undone
stays, marked. `given` of an item and `is_open` of a task follow from the votes, by triggers.
Several processes may have the book open: the server, and a run that adds pairs or reads votes.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import ConfigError, MissingError, StoreError
from diffexpo.files import sha256_of, write_bytes

FILE = "labels.sqlite"
ANSWERS = ("left", "right", "tie", "neither", "skip")
COUNTED = ("left", "right", "tie", "neither")
"""Answers that count; "skip" is none."""
VOTE, CHECK, REPEAT = "vote", "check", "repeat"
_BUSY_S = 10.0
_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (image TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    item TEXT PRIMARY KEY, batch INTEGER NOT NULL, pair TEXT NOT NULL, kind TEXT NOT NULL,
    question TEXT NOT NULL, prompt_id TEXT NOT NULL, prompt TEXT NOT NULL, image_a TEXT NOT NULL,
    image_b TEXT NOT NULL, name_a TEXT NOT NULL, name_b TEXT NOT NULL, wanted INTEGER NOT NULL,
    given INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS raters (
    rater INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token_hash TEXT UNIQUE, created REAL NOT NULL,
    expires REAL, revoked REAL, consented REAL);
CREATE TABLE IF NOT EXISTS tasks (
    task INTEGER PRIMARY KEY, rater INTEGER NOT NULL, place INTEGER NOT NULL, item TEXT NOT NULL,
    kind TEXT NOT NULL, swapped INTEGER NOT NULL, made REAL NOT NULL, shown REAL,
    is_open INTEGER NOT NULL DEFAULT 1, UNIQUE (rater, place));
CREATE TABLE IF NOT EXISTS votes (
    vote INTEGER PRIMARY KEY, task INTEGER NOT NULL, answer TEXT NOT NULL, at REAL NOT NULL, seconds REAL,
    undone REAL);
CREATE INDEX IF NOT EXISTS tasks_of_item ON tasks (item, kind);
CREATE INDEX IF NOT EXISTS tasks_that_are_open ON tasks (item, made, rater) WHERE is_open AND kind = 'vote';
CREATE UNIQUE INDEX IF NOT EXISTS one_vote ON votes (task) WHERE undone IS NULL;
CREATE TRIGGER IF NOT EXISTS voted AFTER INSERT ON votes BEGIN
    UPDATE tasks SET is_open = 0 WHERE task = NEW.task;
    UPDATE items SET given = given + (NEW.answer <> 'skip')
    WHERE item = (SELECT item FROM tasks WHERE task = NEW.task AND kind = 'vote');
END;
CREATE TRIGGER IF NOT EXISTS taken_back AFTER UPDATE OF undone ON votes BEGIN
    UPDATE tasks SET is_open = 1 WHERE task = NEW.task;
    UPDATE items SET given = given - (NEW.answer <> 'skip')
    WHERE item = (SELECT item FROM tasks WHERE task = NEW.task AND kind = 'vote');
END;
"""
_VOTES = """
SELECT tasks.rater, tasks.item, items.question, tasks.kind, tasks.place, votes.answer, tasks.swapped,
    votes.at, votes.seconds
FROM votes JOIN tasks USING (task) JOIN items USING (item)
WHERE votes.undone IS NULL AND (?1 IS NULL OR items.batch = ?1) AND (?2 IS NULL OR tasks.rater = ?2)
ORDER BY votes.vote
"""


@dataclass(frozen=True, slots=True)
class Item:
    """One question on two images a and b of a prompt; `pair` is the same for all questions on them.

    `name_a` and `name_b` are sample ids or models, which raters never see; of a check, b is the ruined copy
    of a. `wanted` is how many answers it is to get; `batch` tells iterations of a run apart.
    """

    item: str
    batch: int
    pair: str
    kind: str
    question: str
    prompt_id: str
    prompt: str
    image_a: str
    image_b: str
    name_a: str
    name_b: str
    wanted: int


@dataclass(frozen=True, slots=True)
class Rater:
    """Who may answer; times are seconds since 1970."""

    rater: int
    name: str
    created: float
    expires: float | None
    revoked: float | None
    consented: float | None


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer that stands, with what it was given to.

    `preference` is 1 where a was preferred, 0 where b was, 0.5 for a tie or neither, None for a skip.
    `kind` is "vote", "check" or "repeat"; `place` counts the rater's tasks.
    """

    rater: int
    item: str
    question: str
    kind: str
    place: int
    answer: str
    swapped: int
    at: float
    seconds: float | None

    @property
    def is_a_left(self) -> bool:
        """Whether image a was on the left."""
        return not self.swapped

    @property
    def preference(self) -> float | None:
        if self.answer == "skip":
            return None
        if self.answer in ("left", "right"):
            return float((self.answer == "left") == self.is_a_left)
        return 0.5


class Book:
    """An open book.

    Args:
        folder: Where `labels.sqlite` and `images` are.
        create: Facts that a new book is made with; None opens one that is there.
    Raises:
        MissingError: there is no book. StoreError: it is damaged, locked or cannot be written.
    """

    def __init__(self, folder: Path, create: Mapping[str, object] | None = None) -> None:
        self.folder, self.path = folder, folder / FILE
        if create is None and not self.path.is_file():
            raise MissingError(
                f"there is nothing to rate in {folder}: {FILE} is not there. A run with a reward of type "
                "human writes it when its first images are drawn; `diffexpo study new` makes one from "
                "images that are there"
            )
        self._lock = threading.RLock()
        with self._told():
            (folder / "images").mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            if create is not None:
                self._connection.executescript(_SCHEMA)
        if create is not None and self.fact("format") is None:
            self.set_facts({"format": _FORMAT, "state": "open", "key": secrets.token_hex(8), **create})
        if self.fact("format") != _FORMAT:
            raise StoreError(
                f"{self.path} has format {self.fact('format')}, this version reads {_FORMAT}; use the "
                "version that wrote it"
            )

    def close(self) -> None:
        """Close the file; what was acknowledged is on the disk already."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # ---- reading and writing -------------------------------------------------------------------------------

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction; on the disk when the block has ended, undone if it raises."""
        with self._lock, self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._lock, self._told():
            return self._connection.execute(query, values).fetchall()

    def fact(self, name: str) -> Any:
        """A fact of the book; None if it has none of this name."""
        found = self.rows("SELECT value FROM facts WHERE name = ?", name)
        return parse_json(found[0][0]) if found else None

    def set_facts(self, facts: Mapping[str, object]) -> None:
        """Set facts, of JSON values."""
        with self.change() as connection:
            written = [(name, json.dumps(value)) for name, value in facts.items()]
            connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", written)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite refuses, as one clear error."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                advice = "another process holds it; stop that one, and check that only one server runs"
            elif "full" in text:
                advice = "the disk is full; free space and try again"
            else:
                advice = "check the disk and its permissions"
            raise StoreError(
                f"{self.path} could not be used ({text}): {advice}. Votes that were confirmed are in it"
            ) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise StoreError(f"{self.path} is damaged ({error}); restore it from a copy") from error

    # ---- images and items ----------------------------------------------------------------------------------

    def add_images(self, images: Sequence[bytes]) -> list[str]:
        """Keep PNG files under random names, which tell nothing; returns the names in the same order. Equal
        files get one name."""
        names = {png: secrets.token_hex(16) for png in images}
        for png, name in names.items():
            write_bytes(self.image_path(name), png)
        with self.change() as connection:
            digests = [(name, sha256(png).hexdigest()) for png, name in names.items()]
            connection.executemany("INSERT INTO images VALUES (?, ?)", digests)
        return [names[png] for png in images]

    def image_path(self, name: str) -> Path:
        """Where an image lies."""
        return self.folder / "images" / f"{name}.png"

    def has_image(self, name: str) -> bool:
        """Whether an image of this name belongs to the book."""
        return bool(self.rows("SELECT 1 FROM images WHERE image = ?", name))

    def verify_images(self) -> None:
        """A StoreError that names the first image that is gone or not the one that was added."""
        for name, digest in self.rows("SELECT image, sha256 FROM images ORDER BY image"):
            path = self.image_path(name)
            if not path.is_file() or sha256_of(path) != digest:
                what = "has changed" if path.is_file() else "is missing"
                raise StoreError(
                    f"{path} {what}: votes on it would be votes on another image; restore it from a copy, "
                    "or start a new study"
                )

    def add_items(self, items: Sequence[Item]) -> None:
        """Add questions, all or none."""
        with self.change() as connection:
            values = [tuple(getattr(item, name) for name in Item.__slots__) for item in items]
            columns, marks = ", ".join(Item.__slots__), ", ".join("?" * len(Item.__slots__))
            connection.executemany(f"INSERT INTO items ({columns}) VALUES ({marks})", values)

    def items(self, batch: int | None = None, kind: str | None = None) -> list[Item]:
        """Questions of a batch and a kind ("vote" or "check"), or all."""
        found = self.rows(f"SELECT {', '.join(Item.__slots__)} FROM items ORDER BY batch, item")
        items = [Item(*row) for row in found]
        return [
            item
            for item in items
            if item.batch in (batch, item.batch if batch is None else batch)
            and (kind is None or item.kind == kind)
        ]

    def more_votes(self, count: int) -> None:
        """Let every question get this many more answers."""
        if count < 1:
            raise ConfigError(f"{count} more votes: expected 1 or more")
        with self.change() as connection:
            connection.execute("UPDATE items SET wanted = wanted + ? WHERE kind = ?", (count, VOTE))

    # ---- raters and votes ----------------------------------------------------------------------------------

    def raters(self) -> list[Rater]:
        """Everybody who has, or had, a link."""
        return [
            Rater(*row)
            for row in self.rows(f"SELECT {', '.join(Rater.__slots__)} FROM raters ORDER BY rater")
        ]

    def votes(self, batch: int | None = None, rater: int | None = None) -> list[Vote]:
        """Every answer that stands, in the order of arrival; of one batch and one rater, or of all."""
        return [Vote(*row) for row in self.rows(_VOTES, batch, rater)]

    def consent(self, rater: int) -> None:
        """Note that a rater has agreed."""
        with self.change() as connection:
            update = "UPDATE raters SET consented = ? WHERE rater = ? AND consented IS NULL"
            connection.execute(update, (time.time(), rater))
