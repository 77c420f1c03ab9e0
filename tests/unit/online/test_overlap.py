"""Scoring behind drawing: the same store, no unit lost, errors and interruptions as if it were serial."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from diffexpo.data.store import Store
from diffexpo.errors import Interrupted, RewardError
from diffexpo.online.units import collect, latents_of_unit
from diffexpo.types import Drawn
from tests.unit.online.test_collect import make_drawing, red, units_of


def nothing() -> None:
    return None


def contents(root):
    store = Store(root)
    store.write_manifest("collect", 2, {})
    rows = store.samples(2)
    return rows, store.latents([row.sample_id for row in rows])


class Counting:
    """A scorer with a memory: its numbers depend on how often and in what order it was called."""

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0

    def __call__(self, drawn, prompts):
        self.running += 1
        assert self.running == 1, "two calls at once"
        self.calls += 1
        scores = red(drawn, prompts) | {"order": np.full(len(prompts), float(self.calls))}
        self.running -= 1
        return scores


def run(root, overlap, *, draw=latents_of_unit, tick=nothing, score=None):
    drawing = make_drawing(score=score or Counting())
    store = Store(root)
    collect(drawing, units_of(drawing), store, rank=0, size=1, tick=tick, draw=draw, overlap=overlap)


def scoring_draw(drawing, unit, tick):
    """A draw that scores what it draws, as branching does."""
    latents = latents_of_unit(drawing, unit, tick)
    scores = drawing.score(Drawn(latents, drawing.policy.decode_latents(latents)), ["x"] * len(latents))
    return latents + float(scores["order"][0])


@pytest.mark.parametrize("draw", [latents_of_unit, scoring_draw])
def test_the_store_is_that_of_a_serial_run(draw, tmp_path):
    run(tmp_path / "serial", False, draw=draw)
    run(tmp_path / "overlapped", True, draw=draw)
    (rows, latents), (other_rows, other_latents) = (
        contents(tmp_path / "serial"),
        contents(tmp_path / "overlapped"),
    )
    assert rows == other_rows and np.array_equal(latents, other_latents)
    assert len({row.rewards["order"] for row in rows}) == 8


@pytest.mark.parametrize("overlap", [True, False])
def test_a_unit_is_scored_while_the_next_is_drawn(overlap, tmp_path):
    next_is_drawn = [threading.Event() for _ in range(9)]
    met = []

    def draw(drawing, unit, tick):
        next_is_drawn[unit.number].set()
        return latents_of_unit(drawing, unit, tick)

    def score(drawn, prompts):
        # True at once if the next unit is being drawn; a serial run waits in vain.
        met.append(next_is_drawn[len(met) + 1].wait(5 if overlap and len(met) < 7 else 0))
        return red(drawn, prompts)

    run(tmp_path, overlap, draw=draw, score=score)
    assert met == [overlap] * 7 + [False]


@pytest.mark.parametrize("overlap", [True, False])
def test_errors_of_a_scorer_surface(overlap, tmp_path):
    calls = []

    def score(drawn, prompts):
        calls.append(None)
        if len(calls) == 3:
            raise RewardError("server is gone")
        return red(drawn, prompts)

    with pytest.raises(RewardError, match="server is gone"):
        run(tmp_path, overlap, score=score)
    store = Store(tmp_path)
    assert [store.unit_done(2, number) for number in range(8)] == [True] * 2 + [False] * 6
    assert len(calls) == 3


def test_interruption_in_a_scorer_passes_through(tmp_path):
    def score(drawn, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, True, score=score)


def test_the_unit_that_is_scored_when_the_run_stops_is_kept(tmp_path):
    started, ticks = threading.Event(), []

    def score(drawn, prompts):
        started.set()
        stopped.wait(5)
        return red(drawn, prompts)

    stopped = threading.Event()

    def tick():
        ticks.append(None)
        if len(ticks) == 7:  # within the second unit
            assert started.wait(5)
            stopped.set()
            raise Interrupted("stopped by SIGINT")

    with pytest.raises(Interrupted, match="SIGINT"):
        run(tmp_path, True, tick=tick, score=score)
    store = Store(tmp_path)
    assert [store.unit_done(2, number) for number in range(3)] == [True, False, False]


def test_a_scorer_that_fails_while_the_run_stops_does_not_hide_why(tmp_path):
    ticks = []

    def score(drawn, prompts):
        raise RewardError("server is gone")

    def tick():
        ticks.append(None)
        if len(ticks) == 7:
            raise Interrupted("stopped by SIGINT")

    with pytest.raises(Interrupted, match="SIGINT"):
        run(tmp_path, True, tick=tick, score=score)


def test_no_thread_is_left(tmp_path):
    run(tmp_path, True)
    assert not [thread for thread in threading.enumerate() if thread.name == "scoring"]


def test_ticks_are_the_same(tmp_path):
    counts = []
    for overlap in (True, False):
        ticks = []
        run(tmp_path / str(overlap), overlap, tick=lambda ticks=ticks: ticks.append(None))
        counts.append(len(ticks))
    drawing = make_drawing()
    assert counts == [len(units_of(drawing)) * (drawing.sampler.steps + 1)] * 2
