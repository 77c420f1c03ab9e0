"""`python -m tests.faults.shim ARGUMENTS`: the command, one of whose operations on the files of a folder fails.

The variable FAULT holds JSON: {"root": folder, "log": file, "at": number or null, "kind": "kill", "torn", or the name
of an errno}. Operations are counted from 0 and listed in the log; a full disk (ENOSPC, EDQUOT) stays full from
that one on. What libraries write outside of Python is not seen.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAYS_FULL = ("ENOSPC", "EDQUOT")
ROOM = ("open", "write", "pwrite", "mkdir", "fsync")
"""Operations that a full disk refuses."""
BY_PATH = ("mkdir", "unlink", "remove", "rmdir", "replace", "rename", "truncate")
BY_FILE = ("write", "pwrite", "fsync", "ftruncate")


class Faults:
    """Counts operations below a folder and lets one fail."""

    def __init__(self, root: str, log: str, at: int | None, kind: str) -> None:
        self.root, self.at, self.kind, self.count = os.path.realpath(root), at, kind, 0
        # As early as here, before anything is counted.
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._write = os.write

    def meet(self, name: str, place: Any, half: Callable[[], object] = lambda: None) -> None:
        """Called before an operation; `half` does a half of it."""
        path = self._path(place)
        if path is None or not (path + "/").startswith(self.root + "/"):
            return
        number, self.count = self.count, self.count + 1
        self._write(self._log, f"{number} {name} {os.path.relpath(path, self.root)}\n".encode())
        if self.at is None or number < self.at:
            return
        if self.kind in ("kill", "torn"):
            if self.kind == "torn":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        stays = self.kind in STAYS_FULL
        if (stays and name in ROOM) or (not stays and number == self.at):
            code = getattr(errno, self.kind)
            raise OSError(code, os.strerror(code), path)

    @staticmethod
    def _path(place: Any) -> str | None:
        if isinstance(place, int):
            try:
                return os.readlink(f"/proc/self/fd/{place}")
            except OSError:
                return None
        return os.path.realpath(os.fsdecode(place)) if isinstance(place, (str, bytes, os.PathLike)) else None


def install(faults: Faults) -> None:
    """Put the counting in front of what Python offers for writing."""
    for name in (*BY_PATH, *BY_FILE):
        _wrap(faults, name)
    open_file, os_open = io.open, os.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if any(letter in mode for letter in "wax+"):
            faults.meet("open", file)
        return open_file(file, mode, *arguments, **options)

    def os_opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and "dir_fd" not in options:
            faults.meet("open", path)
        return os_open(path, flags, *arguments, **options)

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.open = os_opened  # type: ignore[assignment]


def _wrap(faults: Faults, name: str) -> None:
    real = getattr(os, name)

    @functools.wraps(real)
    def counted(place: Any, *arguments: Any, **options: Any) -> Any:
        half = functools.partial(lambda data: real(place, data[: len(data) // 2]), *arguments[:1])
        if options.get("dir_fd") is None:
            faults.meet(name, place, half if name == "write" else lambda: None)
        return real(place, *arguments, **options)

    setattr(os, name, counted)


if __name__ == "__main__":
    from diffexpo.cli.main import main

    settings = json.loads(os.environ["FAULT"])
    Path(settings["log"]).parent.mkdir(parents=True, exist_ok=True)
    install(Faults(**settings))
    main(sys.argv[1:])
