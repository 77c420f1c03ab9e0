"""Work done a little before its turn, in other threads; always in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from diffexpo.errors import DiffexpoError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 4
MAX_ITEMS = 64
MAX_WEIGHT = 8 * 1024 * 1024


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
        function: Called in several threads; `items` are read in the calling one.
        weight: Bytes of an item. Those ahead are at most 64 and weigh 8 MiB with all but the last of them;
            one of weight 0 takes no thread.
        threads: How many; by default one for each processor that this process may use, up to 4. One does
            nothing ahead.
    """
    if threads is None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        threads = min(MAX_THREADS, len(usable))
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, "ahead")

    def begun() -> Iterator[tuple[int, Callable[[], Result]]]:
        try:
            for item in items:
                size = weight(item)
                yield size, pool.submit(function, item).result if size else partial(function, item)
        except (DiffexpoError, OSError) as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            yield 0, failed.result

    coming, waiting, held = begun(), deque[tuple[int, Callable[[], Result]]](), 0
    try:
        while True:
            while len(waiting) < MAX_ITEMS and held < MAX_WEIGHT and (one := next(coming, None)):
                waiting.append(one)
                held += one[0]
            if not waiting:
                break
            size, result = waiting.popleft()
            held -= size
            yield result()
    finally:
        pool.shutdown(cancel_futures=True)


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items in order, each made in a thread of its own while the one before it is used; what making one
    raises is raised in its turn."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(lambda: next(items, None))
        while (item := coming.result()) is not None:
            coming = pool.submit(lambda: next(items, None))
            yield item
