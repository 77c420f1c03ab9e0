"""Which size a prompt is drawn at, and that images of a unit share one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from diffexpo.online.agents import Agent
from diffexpo.online.explore import Request, choose_buckets
from diffexpo.online.units import make_units
from diffexpo.types import Prompt

REQUESTS = [Request(Prompt(f"p{number}", f"word {number}"), None) for number in range(4000)]


def test_shares_are_kept_and_the_draw_belongs_to_the_prompt() -> None:
    shares = np.array([0.5, 0.0, 0.2, 0.3])
    found = choose_buckets(REQUESTS, shares * 7, seed=1)
    counts = Counter(request.bucket for request in found)
    assert counts[1] == 0
    for bucket, share in enumerate(shares):
        assert abs(counts[bucket] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 1e-12
    # Neither order, nor company, nor a negative prompt matters; the seed does.
    some = [replace(REQUESTS[number], negative="dark") for number in (17, 5, 17)]
    assert [request.bucket for request in choose_buckets(some, shares, seed=1)] == [
        found[number].bucket for number in (17, 5, 17)
    ]
    assert choose_buckets(REQUESTS, shares, seed=2) != found
    assert [request.prompt for request in found] == [request.prompt for request in REQUESTS]


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [3.0, 0.0, 0.0]])
def test_the_first_alone_is_the_first(shares: list[float]) -> None:
    assert choose_buckets(REQUESTS[:50], shares, seed=1) == REQUESTS[:50]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_units_are_cut_by_size_and_hold_every_image_once(batch_size: int) -> None:
    requests = choose_buckets(REQUESTS[:13], [1.0, 1.0, 1.0], seed=1)
    assert {request.bucket for request in requests} == {0, 1, 2}
    agents = [Agent(name, name, 3, False, "") for name in ("main", "exploration")]
    units = make_units(agents, requests, batch_size)
    assert [unit.number for unit in units] == list(range(len(units)))
    for unit in units:
        assert {item.request.bucket for item in unit.items} == {unit.bucket}
        assert len(unit.items) <= batch_size
    drawn = Counter((unit.agent.name, item.group, item.index) for unit in units for item in unit.items)
    assert set(drawn.values()) == {1} and len(drawn) == 2 * 13 * 3
    assert all(requests[item.group] is item.request for unit in units for item in unit.items)
    # Only the last unit of a size is not full.
    counts = Counter((unit.agent.name, unit.bucket) for unit in units)
    for (agent, bucket), count in counts.items():
        images = 3 * sum(request.bucket == bucket for request in requests)
        assert count == -(-images // batch_size), agent
