"""The exception tree. Every error a user can cause is one of these, and each carries the process exit code.

A message says what was found (key and value), what was expected and what to do.
"""

from __future__ import annotations

EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_FAILED = 4
EXIT_INTERRUPTED = 75
EXIT_WAITING = 76
# How PyTorch's allocators and CUDA's libraries say it in RuntimeErrors that have no class of their own.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


class DiffexpoError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = EXIT_FAILED


class ConfigError(DiffexpoError):
    """A setting that is unknown, of the wrong type, out of range, or wrong beside another."""

    exit_code = EXIT_USAGE


class MissingError(DiffexpoError):
    """A model, data set, file or optional dependency that is not there."""

    exit_code = EXIT_MISSING


class DataError(DiffexpoError):
    """Data that cannot be used."""


class StoreError(DataError):
    """A run's store is damaged or inconsistent."""


class ImportFormatError(DataError):
    """Foreign data (parquet, images, prompts) that cannot be read."""


class PolicyError(DiffexpoError):
    """A model that does not behave as its family must."""


class RewardError(DiffexpoError):
    """A scorer that fails beyond its budget, or scores that cannot rank anything."""


class ScorerStoppedError(RewardError):
    """A scorer that cannot go on: past its budget of failures, refused by its server, or not the scorer that
    it was. Its failures are never data, so the run stops."""


class TrainingError(DiffexpoError):
    """A loss or gradient that is not finite, or an update that reaches no parameter."""


class OutOfMemory(DiffexpoError):
    """The device or the machine has less memory than a phase of the run takes; the message says what takes
    less."""


class ResumeError(DiffexpoError):
    """A checkpoint or run folder that cannot be continued."""


class RunLockedError(DiffexpoError):
    """The run folder is in use by another process."""


class Interrupted(DiffexpoError):
    """Stopped by a signal after saving; the run continues with `--resume`."""

    exit_code = EXIT_INTERRUPTED


class WaitingError(DiffexpoError):
    """A run that cannot go on before people have answered; it continues with `--resume`."""

    exit_code = EXIT_WAITING


def memory_failure(error: BaseException | None) -> BaseException | None:
    """The failed allocation that an error is, or was caused by; None: it is about something else."""
    while error is not None:
        is_said = isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)
        if isinstance(error, MemoryError) or is_said or type(error).__name__ == "OutOfMemoryError":
            return error
        error = error.__cause__
    return None
