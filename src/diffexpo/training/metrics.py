"""metrics.jsonl: one JSON object per line, {"iteration", "step", "phase", "wall_s", name: value, ...}.

`wall_s` is the time since this process opened the file; nothing else in the file may differ between two runs
of the same configuration. `step` counts optimiser steps done, from 1, and is null on lines that belong to no
step. A value that is not finite is null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import DataError, DiffexpoError
from diffexpo.files import write_bytes


def peak_memory() -> dict[str, float]:
    """The largest resident set of this process so far, GiB, under its name in the file."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {"mem/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


class MetricsWriter:
    """Appends to one metrics file, whose folder is made.

    A line torn by a crash is removed when the file is opened, and damaged lines are kept aside in
    NAME.damaged, with a warning. With `active=False` (processes other than rank 0) every method does nothing.
    `on_line` is called with each line that was written.
    """

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
            self.sync()  # the manifest of the stage, which counts on the line, is written next

    def rewind(self, iteration: int, step: int) -> int:
        """Cut the file before the first step after `step` (that of the checkpoint) of an iteration's
        training, as those steps are done again; returns the number of lines removed."""
        if not self.active:
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines):
            record = parse_json(line)
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
        rows, damaged, sound, torn = _parse(self.path.read_bytes())
        if damaged:
            aside, numbers = damaged_path(self.path), ", ".join(str(number) for number, _ in damaged)
            kept = aside.read_bytes() if aside.exists() else b""
            write_bytes(aside, kept + b"".join(line for _, line in damaged))
            write_bytes(self.path, sound)
            logging.getLogger("diffexpo").warning(
                "%s: line %s damaged, kept aside in %s; what stood there is missing from curves and costs",
                self.path,
                f"{numbers} is" if len(damaged) == 1 else f"{numbers} are",
                aside.name,
            )
        elif torn:
            os.truncate(self.path, len(sound))
        self._once = {(row["iteration"], row["phase"]) for row in rows if row["step"] is None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; one that a crash tore at the end is left out, an absent file is empty.
    DataError if a whole line is not a JSON object with an iteration, a step and a phase."""
    rows, damaged, _, _ = _parse(path.read_bytes() if path.exists() else b"")
    if damaged:
        raise DataError(_say(path, *damaged[0]))
    return rows


def sound_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What can be read of a metrics file, and a sentence on each damaged line, also on those that were kept
    aside before."""
    rows, damaged, _, _ = _parse(path.read_bytes() if path.exists() else b"")
    told = [_say(path, number, line) for number, line in damaged]
    if (aside := damaged_path(path)).exists():
        lines = aside.read_bytes().count(b"\n")
        told.append(f"{path} has lost {lines} damaged lines, which are in {aside.name}")
    return rows, told


def _say(path: Path, number: int, line: bytes) -> str:
    return (
        f"{path} line {number}: expected a JSON object with iteration, step and phase, found {line[:40]!r}; "
        "the file is damaged: restore it, or resume the run, which keeps the line aside"
    )


def damaged_path(path: Path) -> Path:
    """Where the damaged lines of a metrics file are kept."""
    return path.with_name(path.name + ".damaged")


def _parse(data: bytes) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]], bytes, bool]:
    """The JSON objects; damaged lines with their numbers; the sound lines; and whether a crash tore the end,
    or left zeros there, which is neither."""
    rows: list[dict[str, Any]] = []
    damaged, sound = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
            sound.append(line + b"\n")
        elif number < len(lines) - 1 or line.strip(b"\0"):
            damaged.append((number, line + b"\n"))
    kept = b"".join(sound)
    return rows, damaged, kept, len(data) > len(kept)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"iteration", "step", "phase"} <= row.keys() else None
