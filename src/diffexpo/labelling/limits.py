"""Limits on how often somebody may ask, by name: buckets that fill again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_MOST_NAMES = 10_000


class Limit:
    """At most `burst` events of a name at once, and `per_second` on average.

    Args:
        per_second: Events a second in the long run, > 0.
        burst: Events that may come at once, >= 1.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = per_second, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, name: str) -> bool:
        """Count an event of a name; whether it is within the limit."""
        with self._lock:
            now = self._clock()
            left, at = self._buckets.get(name, (float(self._burst), now))
            left = min(float(self._burst), left + (now - at) * self._rate)
            if len(self._buckets) >= _MOST_NAMES and name not in self._buckets:
                self._buckets.clear()
            is_within = left >= 1.0
            self._buckets[name] = (left - 1.0 if is_within else left, now)
            return is_within
