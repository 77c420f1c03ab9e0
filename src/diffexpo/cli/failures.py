"""The edge of the process: every exception becomes a message on standard error and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from diffexpo.assembly import (
    DiffexpoError,
    Interrupted,
    WaitingError,
    explain_refusal,
    memory_failure,
)
from diffexpo.cli.folders import find_run
from diffexpo.cli.processes import is_first


@contextmanager
def boundary(run_dir: Path | None = None) -> Iterator[None]:
    """Inside the block an exception ends the process: 2, 3 or 4 with a message, 75 when interrupted, 76 when
    people have to answer first.

    The log.txt of the run at work, if any, gets the message (and the traceback of what nobody expected), and
    an interruption names the command that continues it.
    """
    try:
        yield
    except (SystemExit, typer.Exit, typer.Abort):
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        if not is_first():
            raise SystemExit(Interrupted.exit_code) from None
        _tell(run_dir, str(error) or "interrupted")
        if run_dir is not None and (run_dir / "config.yaml").is_file():
            _tell(run_dir, f"continue with: diffexpo run --resume {run_dir}")
        elif run_dir is not None:
            _tell(None, "nothing was made yet; start again with the same command")
        raise SystemExit(Interrupted.exit_code) from None
    except WaitingError as error:
        if is_first():
            _tell(run_dir, str(error))
        raise SystemExit(error.exit_code) from None
    except DiffexpoError as error:
        _tell(run_dir, f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        # The reader (`| head`) went away; nobody is left to tell.
        sys.stdout = None
        raise SystemExit(0) from None
    except BaseException as error:  # noqa: BLE001 - the edge of the process
        refusal = explain_refusal(error) if isinstance(error, OSError) else None
        if refusal is not None:
            _tell(run_dir, f"error: {refusal}")
            raise SystemExit(DiffexpoError.exit_code) from None
        if memory_failure(error) is not None:
            _tell(run_dir, f"error: out of memory: {error}\nclose other programs, or use a larger device")
            raise SystemExit(DiffexpoError.exit_code) from None
        where, details = "above", traceback.format_exc()
        if run_dir is not None and run_dir.is_dir():
            _log(run_dir, details)
            where = f"in {run_dir / 'log.txt'}"
        else:
            sys.stderr.write(details)
        defect = f"this is a defect of diffexpo or of an extension; the traceback is {where}"
        _tell(run_dir, f"error: {type(error).__name__}: {error}\n{defect}")
        raise SystemExit(DiffexpoError.exit_code) from None


@contextmanager
def working_on(run: str | None) -> Iterator[Path]:
    """The folder of the run that is meant; what ends the block is told in its log.txt too."""
    run_dir = find_run(run)
    with boundary(run_dir):
        yield run_dir


def _tell(run_dir: Path | None, text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    _log(run_dir, text + "\n")


def _log(run_dir: Path | None, text: str) -> None:
    if run_dir is not None and run_dir.is_dir():
        try:
            with (run_dir / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as problem:
            print(f"(log.txt could not be written: {problem.strerror})", file=sys.stderr)
