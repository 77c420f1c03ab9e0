"""Work that is done a little ahead of its turn, in a few threads; the results come in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

    What `function` raises, and an error of reading `items`, is raised in its turn: behind the results of all items before it.

    Args:
        function: Called in several threads, which overlap where it leaves the interpreter, as decoding does.
        items: Read in the calling thread.
        weight: Bytes of an item. Those ahead are at most 64 and weigh 8 MiB with all but the last of them; one of weight 0
            takes no thread.
        threads: How many; by default one for each processor that this process may use, up to 4. One does nothing ahead.
    """
    threads = min(MAX_THREADS, _num_processors()) if threads is None else threads
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[tuple[int, Callable[[], Result]]] = deque()
    held, is_open, failure = 0, True, None
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            while True:
                while is_open and len(waiting) < MAX_ITEMS and held < MAX_WEIGHT:
                    try:
                        item = next(items)
                    except StopIteration:
                        is_open = False
                    except (DiffexpoError, OSError) as error:
                        is_open, failure = False, error
                    else:
                        size = weight(item)
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
    if failure is not None:
        raise failure


def _num_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
