"""The votes for others: without names, addresses or times of day, in an order that tells no arrival."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from diffexpo.errors import ConfigError
from diffexpo.files import write_text
from diffexpo.labelling.book import Book
from diffexpo.labelling.counting import left_out
from diffexpo.rng import keyed_order

COLUMNS = {
    "rater": "number of the rater, in no order; the same in all rows of the file",
    "question": "what was asked",
    "prompt_id": "which prompt",
    "prompt": "its text",
    "a": "sample or model of image a",
    "b": "sample or model of image b; of an attention check, the ruined copy of a",
    "answer": "a, b, tie, neither or skip",
    "a_is_left": "whether a was on the left",
    "kind": "vote, check (attention check) or repeat (a pair seen before, no vote)",
    "place": "which of the rater's tasks it was, from 0",
    "seconds": "from showing to answering, on the server's clock",
    "is_left_out": "whether the rule fixed beforehand leaves the rater out",
}
"""Columns of exported votes, and what each holds."""


def anonymous_rows(book: Book) -> list[dict[str, Any]]:
    """Every answer that stands, by rater and place."""
    names = keyed_order([str(rater.rater) for rater in book.raters()], str(book.fact("key")), "export")
    numbers = {int(name): number for number, name in enumerate(names, start=1)}
    items, without = {item.item: item for item in book.items()}, left_out(book)
    rows = []
    for vote in book.votes():
        item = items[vote.item]
        side = {"left": vote.is_a_left, "right": not vote.is_a_left}
        rows.append(
            {
                "rater": numbers[vote.rater],
                "question": vote.question,
                "prompt_id": item.prompt_id,
                "prompt": item.prompt,
                "a": item.name_a,
                "b": item.name_b,
                "answer": ("a" if side[vote.answer] else "b") if vote.answer in side else vote.answer,
                "a_is_left": vote.is_a_left,
                "kind": vote.kind,
                "place": vote.place,
                "seconds": None if vote.seconds is None else round(vote.seconds, 3),
                "is_left_out": vote.rater in without,
            }
        )
    return sorted(rows, key=lambda row: (row["rater"], row["place"]))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV with a line of column names."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def export_votes(book: Book, target: Path) -> int:
    """Write the votes as `.csv`, `.jsonl` or `.parquet`, by the name's ending; returns how many."""
    rows = anonymous_rows(book)
    if target.suffix == ".csv":
        write_text(target, as_csv(rows))
    elif target.suffix == ".jsonl":
        write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif target.suffix == ".parquet":
        from diffexpo.data.answers import write_answers

        write_answers(target, rows)
    else:
        raise ConfigError(f"{target}: expected a name that ends with .csv, .jsonl or .parquet")
    return len(rows)
