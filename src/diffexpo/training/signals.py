"""Ctrl-C and SIGTERM set a flag that inner loops check: a run stops within one unit of work, resumable."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any, Self

from diffexpo.errors import EXIT_INTERRUPTED, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Installs handlers for SIGINT and SIGTERM while the `with` block runs.

    The handler only sets a flag; `check()`, called from inner loops, raises `Interrupted`. A second signal
    ends the process at once with exit code 75, which is safe too: nothing on disk depends on an orderly end.
    One that comes within `echo_seconds` of the first counts as the same: launchers such as torchrun forward a
    Ctrl-C that the terminal has already delivered; by default this is 1 s under them and 0 otherwise.
    """

    def __init__(self, echo_seconds: float | None = None) -> None:
        if echo_seconds is None:
            echo_seconds = 1.0 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0
        self.echo_seconds = echo_seconds
        self.received: str | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._wakes: socket.socket | None = None
        self._tellings = itertools.count()
        self._previous_fd = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals; another one ends with its program
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(woken,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._wakes is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._wakes.close()  # ends the thread that watches
            self._wakes = None

    def stop(self, reason: str) -> bool:
        """Let `check` raise because of something else: "process 1 was killed"; False if it already does."""
        if self.received is not None:
            return False
        self.received, self._since = f"because {reason}", time.monotonic()
        return True

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived since the block was entered."""
        if self.received is not None:
            raise Interrupted(f"stopped {self.received}; everything so far is saved")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = f"by {signal.Signals(number).name}", now
            self._tell()
        elif now - self._since >= self.echo_seconds:
            os._exit(EXIT_INTERRUPTED)

    def _tell(self) -> None:
        is_first = os.environ.get("RANK", "0") == "0"  # of several processes one tells
        if next(self._tellings) == 0 and is_first:
            # os.write, not print: a handler may run in the middle of another print.
            os.write(2, b"\nstopping: saving first; a second signal quits at once\n")

    def _watch(self, woken: socket.socket) -> None:
        """End the process at a second signal, also where the main thread is inside a call that does not
        return, such as a collective that waits for a process which was stopped: Python's handlers run between
        the main thread's instructions only."""
        first: float | None = None
        with woken:
            while numbers := woken.recv(16):
                now = time.monotonic()
                if not {*numbers} & {*SIGNALS}:
                    continue
                if first is None:
                    first = now
                    self._tell()
                elif now - first >= self.echo_seconds:
                    os._exit(EXIT_INTERRUPTED)
