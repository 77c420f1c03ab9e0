"""A call that runs at once or in a thread of its own while the main thread draws."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """One call and its result; the call begins at once."""

    def __init__(self, call: Callable[[], Result], *, name: str, in_background: bool = True) -> None:
        self._future: Future[Result] = Future()
        # A daemon: a second Ctrl-C ends the process whatever the call waits for.
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        if in_background:
            self._thread.start()
        else:
            self._run(call)

    def wait(self) -> None:
        """Until the call has ended, well or not."""
        if self._thread.ident is not None:
            self._thread.join()

    def result(self) -> Result:
        """What the call returned; what it raised is raised here."""
        self.wait()
        return self._future.result()

    def _run(self, call: Callable[[], Result]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again by result()
            self._future.set_exception(error)
