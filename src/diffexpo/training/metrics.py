"""metrics.jsonl: one JSON object per line, {"iteration", "step", "phase", "wall_s", name: value, ...}.

`wall_s` is the time since this process opened the file; nothing else in the file may differ between two runs
of the same configuration. `step` counts optimiser steps done, from 1, and is null on lines that belong to no
step. A value that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from diffexpo.errors import DiffexpoError


class MetricsWriter:
    """Appends to one metrics file. A line torn by a crash is removed when the file is opened.

    Args:
        path: The file; its folder is made.
        active: False makes every method do nothing (processes other than rank 0).
    """

    def __init__(self, path: Path, *, active: bool = True) -> None:
        self.path = Path(path)
        self.active = active
        self._start = time.monotonic()
        self._once: set[tuple[int, str]] = set()
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._scan()

    def write(self, iteration: int, step: int | None, phase: str, values: Mapping[str, float | None]) -> None:
        """Append one line and hand it to the operating system.

        Raises:
            DiffexpoError: the disk is full or the file cannot be written.
        """
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

    def write_once(self, iteration: int, phase: str, values: Mapping[str, float | None]) -> None:
        """Append a line for a whole phase unless the file has one (of a stage that is repeated)."""
        if self.active and (iteration, phase) not in self._once:
            self.write(iteration, None, phase, values)
            self._once.add((iteration, phase))

    def rewind(self, iteration: int, step: int, phase: str = "train") -> int:
        """Cut the file before the first line of (iteration, phase) with a later step: those are done again.

        Args:
            iteration: Iteration that is being trained.
            step: Optimiser steps that the checkpoint holds; their lines stay.
            phase: Phase of the lines.
        Returns:
            Number of lines removed.
        """
        if not self.active:
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines):
            record = json.loads(line)
            if record["iteration"] == iteration and record["phase"] == phase and record["step"] > step:
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
        data = self.path.read_bytes()
        whole = _whole_lines(data)
        if whole < len(data):
            os.truncate(self.path, whole)
        self._once = {
            (record["iteration"], record["phase"])
            for record in map(json.loads, data[:whole].splitlines())
            if record["step"] is None
        }


def read_metrics(path: Path) -> list[dict[str, float | str | None]]:
    """Every complete line of a metrics file; a truncated last line is left out."""
    data = Path(path).read_bytes()
    return [json.loads(line) for line in data[: _whole_lines(data)].splitlines()]


def _whole_lines(data: bytes) -> int:
    """Length of the complete JSON lines at the start: a crash can tear the tail, or leave zeros there."""
    length = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            json.loads(line)
        except ValueError:
            break
        length += len(line)
    return length
