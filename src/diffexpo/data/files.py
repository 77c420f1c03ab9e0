"""Files that are either whole or absent, whatever moment the process dies at.

    write temporary name -> fsync -> rename -> fsync of the folder

A rename is atomic, and the two fsyncs keep its order on the disk; what a killed process leaves is a `.tmp`
file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffexpo.errors import StoreError

TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end of the block it becomes `path`, at an exception it is removed.

    Raises:
        StoreError: the file system refused (full, read-only, ...); an older file at `path` is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        _forget(temporary)
        advice = (
            "free space and resume"
            if error.errno in _FULL
            else "check the disk and its permissions, then resume"
        )
        raise StoreError(
            f"could not write {path}: {error.strerror or error}. Nothing stored before is lost: {advice}."
        ) from error
    except BaseException:
        _forget(temporary)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes so that `path` holds all of them or does not change."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # never made, or the disk refuses that too: it goes as garbage at the next start
