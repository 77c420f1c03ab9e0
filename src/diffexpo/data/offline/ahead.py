"""Work done a little before its turn, in a few threads, or a little after, in one; always in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self, TypeVar

from diffexpo.errors import DiffexpoError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 4
MAX_ITEMS = 64
MAX_WEIGHT = 8 * 1024 * 1024
MAX_BEHIND = 2


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    weight: Callable[[Item], int],
    *,
    threads: int | None = None,
) -> Iterator[Result]:
    """function(item) of each item, in order, computed while the results before it are used.

    Errors of `function` and of reading `items` are raised in their turn, after all results before them.

    Args:
        function: Called in several threads, which overlap where it leaves the interpreter, as decoding does.
        items: Read in the calling thread.
        weight: Bytes of an item. Those ahead are at most 64 and weigh 8 MiB with all but the last of them;
            one of weight 0 takes no thread.
        threads: How many; by default one for each processor that this process may use, up to 4. One does
            nothing ahead.
    """
    threads = min(MAX_THREADS, _num_processors()) if threads is None else threads
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[tuple[int, Callable[[], Result]]] = deque()
    held, failure = 0, None
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        while True:
            while failure is None and len(waiting) < MAX_ITEMS and held < MAX_WEIGHT:
                try:
                    item = next(items)
                except (StopIteration, DiffexpoError, OSError) as error:
                    failure = error
                else:
                    size = weight(item)
                    result: Callable[[], Result]
                    result = pool.submit(function, item).result if size else partial(function, item)
                    waiting.append((size, result))
                    held += size
            if not waiting:
                break
            size, result = waiting.popleft()
            held -= size
            yield result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None and not isinstance(failure, StopIteration):
        raise failure


class Behind:
    """Does jobs in a thread of its own, in order, while its owner prepares the next ones; at most two wait.

    What a job raises is raised by a later call, and no later job is done. The context waits for all jobs at
    its end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "behind")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def do(self, job: Callable[[], None]) -> None:
        """Add a job to those there are."""
        while len(self._waiting) >= MAX_BEHIND:
            self._take()
        self._waiting.append(self._pool.submit(self._run, job))

    def wait(self) -> None:
        """Until all jobs are done."""
        while self._waiting:
            self._take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def _take(self) -> None:
        self._waiting[0].result()
        self._waiting.popleft()


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
