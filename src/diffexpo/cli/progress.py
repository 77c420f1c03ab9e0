"""What a person sees while a run works: phases with rate and ETA, lines, warnings, tables; and the same in
log.txt.

On a terminal a phase is a live bar; elsewhere it is plain lines: one at the start, one at the end, and at
most one per ten seconds between. `NO_COLOR` turns colours off. Only the first of several processes speaks.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from diffexpo.cli.processes import is_first

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress

INTERVAL_S = 10.0
# Columns that the whole bar takes, and those of "ETA 0:00:00" with its gaps.
WIDE, NARROW = 92, 15


def duration(seconds: float) -> str:
    """Seconds in words: `duration(75)` is "1:15"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate(units_per_s: float, unit: str) -> str:
    """A speed: `rate(12.34, "images")` is "12.3 images/s"."""
    if units_per_s >= 100:
        return f"{units_per_s:.0f} {unit}/s"
    return f"{units_per_s:.1f} {unit}/s" if units_per_s >= 1 else f"{units_per_s:.2f} {unit}/s"


class Phase:
    """One phase in progress; `advance` is called after every finished unit."""

    def __init__(
        self, name: str, total: int, unit: str, say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.bar: Callable[[int], None] | None = None
        self._say, self._clock = say, clock
        self._start = self._last = clock()

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    @property
    def speed(self) -> float:
        """Units per second so far."""
        return self.done / max(self.elapsed, 1e-9)

    def advance(self, count: int = 1) -> None:
        """Count more finished units; a plain line if ten seconds have passed since the last."""
        self.done += count
        if self.bar is not None:
            self.bar(count)
        now = self._clock()
        if now - self._last < INTERVAL_S or self.done == self.total:
            return
        self._last, speed = now, self.speed
        told, left = f"{self.done} {self.unit}", ""
        if self.done < self.total:
            told = f"{self.done}/{self.total} {self.unit} ({100 * self.done / self.total:.0f}%)"
            left = f" ETA {duration((self.total - self.done) / speed)}" if speed > 0 else " ETA unknown"
        self._say(f"{self.name}: {told} {rate(speed, self.unit)}{left}")

    def summary(self, complete: bool) -> str:
        """The closing line."""
        of = f"/{self.total}" if self.total else ""
        count = f"{self.done} {self.unit}" if complete else f"stopped at {self.done}{of} {self.unit}"
        tail = f" ({rate(self.speed, self.unit)})" if self.done and self.elapsed >= 0.05 else ""
        return f"{self.name}: {count} in {duration(self.elapsed)}{tail}"


class Nowhere(io.StringIO):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


class Console:
    """Output of a command to a stream (by default standard output), with live bars or plain lines (by default
    as the stream is a terminal or not); NO_COLOR and RANK are read from `environment`."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interactive: bool | None = None,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        environment = os.environ if environment is None else environment
        self._stream = sys.stdout if stream is None else stream
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._color = not environment.get("NO_COLOR")
        self._silent = not is_first(environment)
        self._clock = clock
        self._log: Path | None = None
        self._unlogged: list[str] = []
        self._progress: Progress | None = None

    def attach_log(self, path: Path) -> None:
        """Every line goes to this file too, with its time; also those that were said before."""
        if not self._silent:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path
            self._write_log()

    def line(self, text: str = "") -> None:
        """One plain line."""
        self._tell(text, None)

    def warning(self, text: str) -> None:
        """A line that begins with `warning:`."""
        self._tell(f"warning: {text}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A titled table; numbers to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
        numbers = [
            bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))
        ]
        forms = [f"{{:{'>' if right else '<'}{width}}}" for width, right in zip(widths, numbers, strict=True)]
        self.line(title)
        for row in (columns, ["-" * width for width in widths], *cells):
            self.line("  " + "  ".join(forms).format(*row).rstrip())

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Phase]:
        """A phase of `total` units (0: unknown), advanced inside the block; its last line tells the rate."""
        say = self._to_log if self._interactive else self.line
        phase = Phase(name, total, unit, say, self._clock)
        say(f"{name}: {total} {unit}" if total else f"{name} ...")
        complete = False
        try:
            with self._bar(phase) if self._interactive and not self._silent else nullcontext():
                yield phase
            complete = True
        finally:
            self.line(phase.summary(complete))

    @contextmanager
    def _bar(self, phase: Phase) -> Iterator[None]:
        """A live bar for the time of the block."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        if self._progress is None:
            whole = Column(no_wrap=True)
            count = MofNCompleteColumn(table_column=whole)
            left = TimeRemainingColumn(compact=True, table_column=whole)
            columns: list[ProgressColumn] = [TextColumn("{task.description}"), count, TextColumn("ETA"), left]
            if self._rich.width >= WIDE:
                rates = TextColumn("{task.fields[unit]}  {task.fields[speed]}  ETA")
                columns = [TextColumn("{task.description}"), BarColumn(bar_width=28), count, rates, left]
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._progress.start()
        progress = self._progress
        # Count and time left keep their places on a narrow terminal; the name gives way.
        digits = 2 * len(str(phase.total)) + 1
        room = max(self._rich.width - digits - NARROW, 8) if self._rich.width < WIDE else len(phase.name)
        name = phase.name if len(phase.name) <= room else f"{phase.name[: room - 1]}\u2026"
        task = progress.add_task(name, total=phase.total or None, unit=phase.unit, speed="")

        def show(count: int) -> None:
            progress.update(task, advance=count, speed=rate(phase.speed, phase.unit))

        phase.bar = show
        try:
            yield
        finally:
            progress.remove_task(task)
            if not progress.tasks:
                progress.stop()
                self._progress = None

    @cached_property
    def _rich(self) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(
            file=self._stream,
            force_terminal=True,
            no_color=not self._color,
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _tell(self, text: str, style: str | None) -> None:
        try:
            if self._interactive and not self._silent:
                self._rich.print(text, style=style)
            elif not self._silent:
                print(text, file=self._stream, flush=True)
        except OSError:
            self._speak_no_more()
        self._to_log(text)

    def _speak_no_more(self) -> None:
        """The reader has gone away, or its disk is full: the work goes on, log.txt has the lines."""
        self._silent = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # else what waits in the buffer fails at the very end
            os.close(nowhere)

    def _to_log(self, text: str) -> None:
        self._unlogged.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._write_log()

    def _write_log(self) -> None:
        if self._log is not None:
            waiting, self._unlogged = self._unlogged, []
            try:
                with self._log.open("a", encoding="utf-8") as file:
                    file.writelines(waiting)
            except OSError as error:  # a log is not worth a run
                path, self._log = self._log, None
                print(f"({path} could not be written: {error.strerror})", file=sys.stderr)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
