"""metrics.jsonl: one JSON object per line, {"iteration", "step", "phase", "wall_s", name: value, ...}.

`wall_s` is the time since this process opened the file; nothing else in the file may differ between two runs
of the same configuration. `step` counts optimiser steps done, from 1, and is null on lines that belong to no
step. A value that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffexpo.errors import DataError, DiffexpoError


def peak_memory() -> dict[str, float]:
    """The largest resident set of this process so far, GiB, under its name in the file."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {"mem/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


class MetricsWriter:
    """Appends to one metrics file, whose folder is made. A line torn by a crash is removed when the file is
    opened; with `active=False` (processes other than rank 0) every method does nothing. `on_line` is called
    with each line that was written."""

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path = Path(path)
        self.active = active
        self._start = time.monotonic()
        self.on_line: Callable[[Mapping[str, object]], None] | None = None
        self._once: set[tuple[int, str]] = set()
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._scan()

    def write(self, iteration: int, step: int | None, phase: str, values: Mapping[str, float | None]) -> None:
        """Append one line and hand it to the operating system; DiffexpoError if it cannot be written."""
        if not self.active:
            return
        since = round(time.monotonic() - self._start, 3)
        record: dict[str, object] = {"iteration": iteration, "step": step, "phase": phase, "wall_s": since}
        for name, value in values.items():
            record[name] = value if value is None or math.isfinite(value) else None
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            advice = "free space and continue with `diffexpo run --resume`"
            raise DiffexpoError(f"cannot write {self.path}: {error.strerror}; {advice}") from error
        if self.on_line is not None:
            self.on_line(record)

    def write_once(self, iteration: int, phase: str, values: Mapping[str, float | None]) -> None:
        """Append a line for a whole phase unless the file has one (of a stage that is repeated)."""
        if self.active and (iteration, phase) not in self._once:
            self.write(iteration, None, phase, values)
            self._once.add((iteration, phase))

    def rewind(self, iteration: int, step: int) -> int:
        """Cut the file before the first step after `step` (that of the checkpoint) of an iteration's
        training, as those steps are done again; returns the number of lines removed."""
        if not self.active:
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines):
            record = json.loads(line)
            if record["iteration"] == iteration and record["phase"] == "train" and record["step"] > step:
                os.truncate(self.path, sum(map(len, lines[:number])))
                self._scan()
                return len(lines) - number
        return 0

    def sync(self) -> None:
        """Force the lines to the disk (before a checkpoint that counts on them)."""
        if self.active:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def _scan(self) -> None:
        self.path.touch()
        rows, length = _whole_lines(self.path.read_bytes())
        os.truncate(self.path, length)
        self._once = {(row["iteration"], row["phase"]) for row in rows if row["step"] is None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; one that a crash tore at the end is left out, an absent file is empty.
    DataError if a line before the last is not a JSON object."""
    data = path.read_bytes() if path.exists() else b""
    rows, length = _whole_lines(data)
    if b"\n" in data[length:-1]:
        line = data[length:].splitlines()[0]
        advice = "the file is damaged"
        raise DataError(f"{path} line {len(rows) + 1}: expected a JSON object, found {line[:40]!r}; {advice}")
    return rows


def _whole_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects at the start, a line each, and the length of these lines: a crash can tear the tail,
    or leave zeros there."""
    rows, length = [], 0
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not line.endswith(b"\n"):
            break
        rows.append(row)
        length += len(line)
    return rows, length
