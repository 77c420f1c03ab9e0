"""The tables of contenders of several seeds as one Markdown table, a column a seed.

    python examples/join_seeds.py runs/seed-0 runs/seed-1 runs/seed-2

reads `contenders.json`, which stands beside each report, and prints every model's score (a share in percent
where the judge says right or wrong), then how far the run's result is above it, with the 95% interval over
prompts and the images that are better and worse; the last column is the mean over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Table = dict[str, Any]
RESULT = "result"


def read_table(folder: str) -> Table:
    """The table of a run's folder."""
    found: Table = json.loads((Path(folder) / "contenders.json").read_text(encoding="utf-8"))
    return found


def join(tables: Sequence[Table]) -> str:
    """One Markdown table of runs that were compared under the same judge."""
    first, is_share = tables[0], tables[0]["is_share"]
    columns = [_by_key(table) for table in tables]
    titles: dict[str, str] = {}
    for column in columns:
        for key, row in column.items():
            titles.setdefault(key, row["title"])
    titles[RESULT] = titles.pop(RESULT)  # the last row, whatever else only some seeds were compared with

    def text(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if is_share else f"{value:{sign}.4g}"

    def difference(row: Table) -> str:
        mean, low, high = (text(value, "+") for value in row["difference"])
        return f"{mean} [{low}, {high}], {row['better']} / {row['worse']}"

    head = ["entirely right, %" if is_share else f"mean {first['judge']}"]
    lines = [[*head, *(f"seed {table['seed']}" for table in tables), "mean"], ["---"] * (len(tables) + 2)]
    for key, title in titles.items():
        rows = [column.get(key) for column in columns]
        values = [row["value"][0] for row in rows if row]
        cells = [text(row["value"][0]) if row else "-" for row in rows]
        lines.append([title, *cells, text(float(np.mean(values)))])
    for key, title in titles.items():
        rows = [column.get(key) for column in columns] if key != RESULT else []
        if rows:
            gains = [row["difference"][0] for row in rows if row]
            cells = [difference(row) if row else "-" for row in rows]
            lines.append([f"{titles[RESULT]} above {title}", *cells, text(float(np.mean(gains)), "+")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _by_key(table: Table) -> dict[str, Table]:
    """Rows by key; the run's result has one of its own, as seeds may keep different iterates."""
    *others, result = table["rows"]
    return {row["key"]: row for row in others} | {RESULT: result}


if __name__ == "__main__":
    print(join([read_table(folder) for folder in sys.argv[1:]]))
