"""The exception tree. Every error a user can cause is one of these, and each carries the process exit code.

    DiffexpoError (4: the run failed)
      ConfigError (2: usage or configuration)
      MissingError (3: a model, data set, file or extra that is not there)
      DataError (4)
        StoreError            a run's store is damaged or inconsistent
        ImportFormatError     foreign data that cannot be read
      PolicyError (4)         a model that does not behave as its family must
      RewardError (4)         a scorer that fails beyond its budget
        ScorerStoppedError    the scorer cannot go on: its failures are never data, so the run stops
      TrainingError (4)       non-finite loss, gradient that reaches nothing
      ResumeError (4)         a checkpoint that cannot be continued
      RunLockedError (4)      the run folder is in use by another process
      Interrupted (75)        stopped by a signal; everything is saved, resume with `--resume`

A message says what was found (key and value), what was expected and what to do.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_FAILED = 4
EXIT_INTERRUPTED = 75


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
    """A scorer that cannot go on: past its budget of failures, refused by its server, or not the scorer that it was."""


class TrainingError(DiffexpoError):
    """A loss or gradient that is not finite, or an update that reaches no parameter."""


class ResumeError(DiffexpoError):
    """A checkpoint or run folder that cannot be continued."""


class RunLockedError(DiffexpoError):
    """The run folder is in use by another process."""


class Interrupted(DiffexpoError):
    """Stopped by a signal after saving; the run continues with `--resume`."""

    exit_code = EXIT_INTERRUPTED
