"""The edge of the process: every exception becomes a message on standard error and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import typer

from diffexpo.assembly import DiffexpoError, Interrupted, memory_failure
from diffexpo.cli.folders import find_run


class Boundary:
    """Inside the block an exception ends the process: 2, 3 or 4 with a message, 75 when interrupted.

    Args:
        run_dir: The run at work, if any: its log.txt gets the message (and the traceback of what nobody
            expected), and an interruption names the command that continues it.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (SystemExit, typer.Exit, typer.Abort)):
            return
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            self._tell(str(error) or "interrupted")
            if self.run_dir is not None:
                self._tell(f"continue with: diffexpo run --resume {self.run_dir}")
            raise SystemExit(Interrupted.exit_code) from None
        if isinstance(error, DiffexpoError):
            self._tell(f"error: {error}")
            raise SystemExit(error.exit_code) from None
        if isinstance(error, BrokenPipeError):
            # The reader (`| head`) went away; nobody is left to tell.
            sys.stdout = None
            raise SystemExit(0) from None
        if memory_failure(error) is not None:
            self._tell(f"error: out of memory: {error}\nclose other programs, or use a larger device")
            raise SystemExit(DiffexpoError.exit_code) from None
        details = "".join(traceback.format_exception(kind, error, trace))
        if self.run_dir is not None and self.run_dir.is_dir():
            self._log(details)
            where = f"the traceback is in {self.run_dir / 'log.txt'}"
        else:
            sys.stderr.write(details)
            where = "the traceback is above"
        self._tell(
            f"error: {type(error).__name__}: {error}\nthis is a defect of diffexpo or of an extension; "
            f"{where}"
        )
        raise SystemExit(DiffexpoError.exit_code) from None

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._log(text + "\n")

    def _log(self, text: str) -> None:
        if self.run_dir is None or not self.run_dir.is_dir():
            return
        try:
            with (self.run_dir / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as problem:
            print(f"(log.txt could not be written: {problem.strerror})", file=sys.stderr)


@contextmanager
def working_on(run: str | None) -> Iterator[Path]:
    """The folder of the run that is meant; what ends the block is told in its log.txt too."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        yield run_dir
