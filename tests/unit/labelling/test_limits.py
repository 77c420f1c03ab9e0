"""A bucket lets a burst through, then its rate, and knows names apart."""

from __future__ import annotations

from diffexpo.labelling.limits import Limit


def test_a_burst_then_the_rate() -> None:
    now = [0.0]
    limit = Limit(2.0, 3, clock=lambda: now[0])
    assert [limit.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert limit.allows("b")
    now[0] += 0.5
    assert [limit.allows("a") for _ in range(2)] == [True, False]
    now[0] += 1000.0
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]


def test_names_do_not_pile_up() -> None:
    limit = Limit(1.0, 1, clock=lambda: 0.0)
    assert all(limit.allows(str(number)) for number in range(25_000))
    assert len(limit._buckets) <= 10_000
