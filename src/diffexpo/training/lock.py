"""One process at a time in a run folder: a lock of the system, so a killed holder leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import RunLockedError


class RunLock:
    """Holds `run.lock` of a run folder while the `with` block runs; a RunLockedError names the pid and host
    of another process that has it.

    The lock is the kernel's (flock) and dies with its process; the text in the file only names the holder.
    With several processes (torchrun) rank 0 takes it for all.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / "run.lock"

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # O_CLOEXEC is Python's default: a program started from here does not inherit (and outlive) the lock.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            what = f"cannot be locked ({error.strerror}); put it on a file system with file locks"
            if isinstance(error, BlockingIOError):
                holder = _describe(os.pread(descriptor, 4096, 0))
                what = f"is in use by {holder}; wait for it to end, stop it, or choose another folder"
            os.close(descriptor)
            raise RunLockedError(f"run folder {self.path.parent} {what}") from error
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(self, *raised: object) -> None:
        # The file stays, else two processes could lock two different files.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _describe(text: bytes) -> str:
    """The holder in words; the text is written after locking, so it can be missing for an instant."""
    try:
        holder = parse_json(text)
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process (it has not written its name yet)"
