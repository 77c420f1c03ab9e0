"""metrics.jsonl: one JSON object per line, {"iteration", "step", "phase", "wall_s", name: value, ...}.

`wall_s` is the time since this process opened the file; nothing else in the file may differ between two runs
of the same configuration. `step` counts optimiser steps done, from 1, and is null on lines that belong to no
step. A value that is not finite is null.

metrics.jsonl.crc32 beside it has the CRC-32 of each line, so that a line that was changed or lost is known.
A line is written before its sum, and sums are taken back before their lines, so a crash leaves lines without
a sum at the end only; they count. What was forced to the disk is marked there: of what came after, a power
cut may leave sums without their lines, which are not called lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import DataError, DiffexpoError
from diffexpo.files import write_bytes

SYNCED = b"synced"
"""Stands in the file of sums where the lines before it were on the disk."""


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
            for path, text in ((self.path, line), (sums_path(self.path), _sum_of(line.encode()) + "\n")):
                with path.open("ab", buffering=0) as file:
                    file.write(text.encode())
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
        """Take back the steps of an iteration's training after `step` (that of the checkpoint), as they are
        done again, and the summary that followed them; returns the number of lines removed."""
        if not self.active:
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        rows = [parse_json(line) for line in lines]
        later = [_is_step(row, iteration, after=step) for row in rows]
        if not any(later):
            return 0
        summary = (iteration, "train_summary")
        kept = [
            line
            for line, row, is_later in zip(lines, rows, later, strict=True)
            if not is_later and (row["iteration"], row["phase"]) != summary
        ]
        _write_sums(self.path, kept)
        write_bytes(self.path, b"".join(kept))
        self._scan()
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Force the lines to the disk (before a checkpoint that counts on them)."""
        if self.active:
            for path, mark in ((self.path, b""), (sums_path(self.path), SYNCED + b"\n")):
                with path.open("ab", buffering=0) as file:
                    file.write(mark)
                    os.fsync(file.fileno())

    def _scan(self) -> None:
        self.path.touch()
        found = _parse(self.path)
        if found.damaged or found.lost:
            aside = damaged_path(self.path)
            kept = aside.read_bytes() if aside.exists() else b""
            lost = [line for _, line in found.damaged] + [b"(lost)\n"] * found.lost
            write_bytes(aside, kept + b"".join(lost))
            write_bytes(self.path, b"".join(found.sound))
            logging.getLogger("diffexpo").warning(
                "%s: %s; what stood there is missing from curves and costs",
                self.path,
                found.describe(aside),
            )
        elif found.is_torn:
            os.truncate(self.path, sum(map(len, found.sound)))
        if found.is_torn or not found.is_summed:
            _write_sums(self.path, found.sound)
        self._once = {(row["iteration"], row["phase"]) for row in found.rows if row["step"] is None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; one that a crash tore at the end is left out, an absent file is empty.
    DataError if a whole line is not a JSON object with an iteration, a step and a phase."""
    found = _parse(path)
    if problems := found.problems(path):
        raise DataError(problems[0])
    return found.rows


def sound_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What can be read of a metrics file, and a sentence on each line that is damaged or lost, also on those
    that were kept aside before."""
    found = _parse(path)
    told = found.problems(path)
    if (aside := damaged_path(path)).exists():
        lines = aside.read_bytes().count(b"\n")
        told.append(f"{path} has lost {lines} damaged lines; what is left of them is in {aside.name}")
    return found.rows, told


def damaged_path(path: Path) -> Path:
    """Where the damaged lines of a metrics file are kept."""
    return path.with_name(path.name + ".damaged")


def sums_path(path: Path) -> Path:
    """Where the checksums of the lines of a metrics file are."""
    return path.with_name(path.name + ".crc32")


@dataclass
class _Parsed:
    """A metrics file: the objects of its `sound` lines, `damaged` lines with their numbers, how many are
    `lost`, whether a crash tore the end or left zeros there, which is neither, and whether the sums are those
    of the sound lines."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[tuple[int, bytes]] = field(default_factory=list)
    sound: list[bytes] = field(default_factory=list)
    lost: int = 0
    is_torn: bool = False
    is_summed: bool = True

    def describe(self, aside: Path) -> str:
        """What was wrong, and where it is kept."""
        numbers = ", ".join(str(number) for number, _ in self.damaged)
        verb = "is" if len(self.damaged) == 1 else "are"
        found = [f"line {numbers} {verb} damaged, kept aside in {aside.name}"] if numbers else []
        return " and ".join(found + ([self.told_lost()] if self.lost else []))

    def told_lost(self) -> str:
        return "1 line is lost" if self.lost == 1 else f"{self.lost} lines are lost"

    def problems(self, path: Path) -> list[str]:
        """A sentence on each."""
        advice = "the file is damaged: restore it, or resume the run, which keeps on without"
        told = [
            f"{path} line {number}: expected a JSON object with iteration, step and phase that matches its "
            f"checksum, found {line[:40]!r}; {advice} it"
            for number, line in self.damaged
        ]
        return told + ([f"{path}: {self.told_lost()}; {advice} it"] if self.lost else [])


def _parse(path: Path) -> _Parsed:
    # Sums first: a process that writes meanwhile then leaves lines without a sum, not sums without a line.
    sums = sums_path(path).read_bytes().split() if sums_path(path).exists() else []
    data = path.read_bytes() if path.exists() else b""
    synced = len(sums) - sums[::-1].index(SYNCED) if SYNCED in sums else 0
    lines, known = data.split(b"\n"), [sum_ for sum_ in sums if sum_ != SYNCED]
    open_sums, promised = Counter(known), Counter(sum_ for sum_ in sums[:synced] if sum_ != SYNCED)
    found = _Parsed()
    unsummed: list[tuple[int, bytes, dict[str, Any]]] = []
    for number, line in enumerate((line + b"\n" for line in lines[:-1]), 1):
        row, own = _row(line), _sum_of(line).encode()
        if row is not None and open_sums[own] > 0:
            open_sums[own] -= 1
            promised[own] -= 1
            found.rows.append(row)
            found.sound.append(line)
        elif row is not None:
            unsummed.append((number, line, row))
        elif number < len(lines) - 1 or line.strip(b"\0\n"):
            found.damaged.append((number, line))
    missing = sum(count for sum_, count in open_sums.items() if len(sum_) == 8)
    for number, line, row in unsummed:
        if missing:  # a sum is left without its line, so this line is what became of one
            found.damaged.append((number, line))
        else:
            found.rows.append(row)
            found.sound.append(line)
    kept = sum(count for sum_, count in promised.items() if count > 0 and len(sum_) == 8)
    found.lost = max(0, kept - len(found.damaged))
    found.is_torn = len(data) > sum(map(len, found.sound))
    found.is_summed = [_sum_of(line).encode() for line in found.sound] == known
    return found


def _sum_of(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _write_sums(path: Path, lines: list[bytes]) -> None:
    sums = [_sum_of(line).encode() for line in lines]
    write_bytes(sums_path(path), b"".join(word + b"\n" for word in [*sums, SYNCED]))


def _is_step(row: Mapping[str, Any], iteration: int, *, after: int) -> bool:
    return row["iteration"] == iteration and row["phase"] == "train" and row["step"] > after


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"iteration", "step", "phase"} <= row.keys() else None
