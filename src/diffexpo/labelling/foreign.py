"""Votes that were given elsewhere: tables, Label Studio's export, D3PO's JSON.

Each becomes a vote of a rater of the book (`NAME (imported)`) on a question that the book asks. What does not
fit is counted by reason; nothing is guessed.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.data.offline.cells import text_of_id
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.labelling.asking import note_left_out
from diffexpo.labelling.book import VOTE, Book, Item

MAX_BYTES = 256 << 20
_CHOICES = {"a": "a", "b": "b", "tie": "tie", "neither": "neither", "skip": "skip"}
_SIDES = {"left": "a", "right": "b"}


@dataclass(frozen=True)
class Foreign:
    """One vote as a file holds it: who, which question, and "a", "b", "tie", "neither" or "skip"."""

    rater: str
    item: Item
    answer: str


@dataclass
class Imported:
    """What became of a file's votes."""

    votes: int = 0
    raters: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """One line for a person."""
        line = f"{self.votes} votes of {len(self.raters)} raters"
        if self.dropped:
            line += "; left out: " + ", ".join(
                f"{count} {why}" for why, count in sorted(self.dropped.items())
            )
        return line


def import_votes(book: Book, path: Path, kind: str = "auto") -> Imported:
    """Take votes of a file into the book.

    Args:
        path: `.csv` or `.jsonl` with the columns `answer` (a, b, tie, neither, skip), `rater`, and either
            `item`, or `a` and `b` (with `prompt_id` and `question` where these do not say which alone), such
            as `diffexpo label export` writes; or JSON of Label Studio or D3PO.
        kind: table, labelstudio, d3po, or auto: by content.
    Raises:
        MissingError: no such file. ImportFormatError: it is none of these formats.
    """
    if not path.is_file():
        raise MissingError(f"{path} does not exist; expected a file of votes")
    if path.stat().st_size > MAX_BYTES:
        raise ImportFormatError(f"{path} has more than {MAX_BYTES >> 20} MiB; expected a file of votes")
    result = Imported()
    items = book.items(kind=VOTE)
    try:
        if path.suffix in (".csv", ".jsonl"):
            if kind not in ("auto", "table"):
                raise ImportFormatError(f"{path} is a table, not of format {kind}; leave --format out")
            votes = _table(_read_table(path), items, result)
        else:
            votes = _json(read_json(path), kind, book, items, result)
        found = list(votes)
    except (ValueError, csv.Error) as error:
        raise ImportFormatError(
            f"{path} cannot be read ({error}); expected CSV, JSON lines or JSON"
        ) from None
    except ImportFormatError as error:
        raise ImportFormatError(f"{path}: {error}") from None
    _write(book, found, result)
    note_left_out(book)
    return result


def _read_table(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for line in file:
            if line.strip():
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ImportFormatError("a line is no JSON object; expected one object a line")
                yield row


def _table(rows: Iterable[Mapping[str, Any]], items: list[Item], result: Imported) -> Iterator[Foreign]:
    """Votes of rows in the columns of an export."""
    for number, row in enumerate(rows):
        if number == 0 and "answer" not in row:
            raise ImportFormatError(f"there is no column answer (there are {', '.join(map(str, row))})")
        if row.get("kind") not in (None, "", VOTE):
            result.dropped["checks and repeats"] += 1
            continue
        chosen = _CHOICES.get(str(row.get("answer") or "").strip().lower())
        item, turned, why = _find(row, items)
        if chosen is None or item is None:
            result.dropped[why if chosen is not None else "without an answer a, b, tie, neither or skip"] += 1
            continue
        yield Foreign(text_of_id(row.get("rater")) or "somebody", item, _turn(chosen, turned))


def _find(row: Mapping[str, Any], items: list[Item]) -> tuple[Item | None, bool, str]:
    """The question that a row means, and whether its a is ours b."""
    texts = {name: text_of_id(row.get(name)) for name in ("item", "question", "prompt_id")}
    named = {name: text for name, text in texts.items() if text is not None}
    images = (row.get("a"), row.get("b"))
    if "item" not in named and None in images:
        return None, False, "naming neither an item nor images a and b"
    fitting = [
        item
        for item in items
        if all(getattr(item, name) == value for name, value in named.items())
        and (None in images or {item.name_a, item.name_b} == {str(name) for name in images})
    ]
    if len(fitting) != 1:
        return (
            None,
            False,
            "on pairs that are not asked here" if not fitting else "that fit several questions",
        )
    is_turned = None not in images and str(images[0]) != fitting[0].name_a
    return fitting[0], is_turned, ""


def _json(value: object, kind: str, book: Book, items: list[Item], result: Imported) -> Iterator[Foreign]:
    """Votes of JSON, whose format is told by its content."""
    rows: list[Any] = value if isinstance(value, list) else []
    is_tasks = bool(rows) and all(isinstance(row, dict) and isinstance(row.get("data"), dict) for row in rows)
    is_matrix = bool(rows) and all(isinstance(row, list) for row in rows)
    if is_tasks and kind in ("auto", "labelstudio"):
        return _label_studio(rows, items, result)
    if is_matrix and kind in ("auto", "d3po"):
        return _d3po(rows, book, items, result)
    wanted = "expected a list of Label Studio's tasks, or D3PO's list of lists of numbers"
    raise ImportFormatError(
        f"it holds neither; {wanted}" if kind == "auto" else f"it is not {kind}; {wanted}"
    )


def _label_studio(tasks: list[dict[str, Any]], items: list[Item], result: Imported) -> Iterator[Foreign]:
    """Votes of tasks whose `data` names `item`, or `a` and `b` with a on the left, and whose annotations
    hold a Pairwise ("selected") or a Choices ("choices") result of left, right, tie, neither or skip."""
    for task in tasks:
        item, turned, why = _find(task["data"], items)
        for annotation in task.get("annotations") or []:
            if item is None:
                result.dropped[why] += 1
                continue
            by = annotation.get("completed_by")
            name = str(by.get("email") or by.get("id")) if isinstance(by, dict) else f"annotator {by}"
            if annotation.get("was_cancelled"):
                yield Foreign(name, item, "skip")
                continue
            chosen = _selected(annotation.get("result") or [])
            if chosen is None:
                result.dropped["without a choice of left, right, tie, neither or skip"] += 1
                continue
            yield Foreign(name, item, _turn(chosen, turned))


def _selected(results: list[Any]) -> str | None:
    for one in results:
        value = one.get("value") if isinstance(one, dict) else None
        if not isinstance(value, dict):
            continue
        words = [value.get("selected"), *(value.get("choices") or [])]
        for word in words:
            text = str(word).strip().lower()
            if text in _SIDES or text in _CHOICES:
                return _SIDES.get(text) or _CHOICES[text]
    return None


def _d3po(matrix: list[list[Any]], book: Book, items: list[Item], result: Imported) -> Iterator[Foreign]:
    """D3PO's file: a row for each prompt of the newest collection, a number for each of its images, larger is
    better; of the two images of a pair the one with the larger number is preferred, equal ones are a tie."""
    groups = book.fact("candidates")
    if not groups:
        raise ImportFormatError(
            "numbers by prompt and image belong to a run's collection; this book is of a study"
        )
    if len(matrix) != len(groups):
        raise ImportFormatError(
            f"it has {len(matrix)} rows, the collection has {len(groups)} prompts; expected one each"
        )
    scores: dict[str, float] = {}
    for number, (row, names) in enumerate(zip(matrix, groups, strict=True)):
        is_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in row)
        if len(row) != len(names) or not is_numbers:
            raise ImportFormatError(
                f"row {number} is {row!r:.60}; expected {len(names)} numbers, one an image"
            )
        scores |= dict(zip(names, row, strict=True))
    for item in items:
        if item.name_a not in scores or item.name_b not in scores:
            result.dropped["of earlier collections"] += 1
            continue
        a, b = scores[item.name_a], scores[item.name_b]
        yield Foreign("d3po", item, "tie" if a == b else "a" if a > b else "b")


def _turn(answer: str, turned: bool) -> str:
    return {"a": "b", "b": "a"}.get(answer, answer) if turned else answer


def _write(book: Book, votes: list[Foreign], result: Imported) -> None:
    """All votes in one transaction; a rater's second vote on a question is left out."""
    now = time.time()
    with book.change() as connection:
        for vote in votes:
            name = f"{vote.rater} (imported)"
            entry = "INSERT OR IGNORE INTO raters (name, created, consented) VALUES (?, ?, ?)"
            connection.execute(entry, (name, now, now))
            rater = connection.execute("SELECT rater FROM raters WHERE name = ?", (name,)).fetchone()[0]
            known = "SELECT 1 FROM tasks WHERE rater = ? AND item = ? AND kind = ?"
            if connection.execute(known, (rater, vote.item.item, VOTE)).fetchone():
                result.dropped["given twice"] += 1
                continue
            place = connection.execute("SELECT count(*) FROM tasks WHERE rater = ?", (rater,)).fetchone()[0]
            made = connection.execute(
                "INSERT INTO tasks (rater, place, item, kind, swapped, made) VALUES (?, ?, ?, ?, 0, ?)",
                (rater, place, vote.item.item, VOTE, now),
            )
            given = {"a": "left", "b": "right"}.get(vote.answer, vote.answer)
            connection.execute(
                "INSERT INTO votes (task, answer, at) VALUES (?, ?, ?)", (made.lastrowid, given, now)
            )
            result.votes += 1
            result.raters.add(vote.rater)
