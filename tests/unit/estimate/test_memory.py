"""The arithmetic of memory, on numbers that can be added by hand."""

from __future__ import annotations

import pytest

from diffexpo.estimate.memory import (
    CONTEXT,
    GIB,
    Item,
    PerRow,
    TrainingShape,
    fits,
    largest_phase,
    peak_bytes,
    phase_bytes,
)


def test_the_peak_is_what_stays_and_the_largest_phase() -> None:
    items = [Item("a", "", 3), Item("b", "", 5, "train"), Item("c", "", 4, "draw"), Item("d", "", 2, "draw")]
    assert largest_phase(items) == "draw"
    assert peak_bytes(items) == 3 + 6
    assert phase_bytes(items, "always") == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (TrainingShape(4), 4 * 110 + 7),
        # The reference's pass comes while the policy's activations are held: 4 * 100 + 7 + 4 * 30.
        (TrainingShape(4, reference_rows=4), 4 * 100 + 7 + 4 * 30),
        # Two halves: one half's gradient, or the pass without gradient on both.
        (TrainingShape(2, prepass_rows=4), 2 * 110 + 7),
        (TrainingShape(1, prepass_rows=16), 16 * 30),
    ],
)
def test_activations_are_the_worst_moment_of_a_step(shape: TrainingShape, expected: int) -> None:
    assert shape.activations(held=PerRow(100, 7), peak=PerRow(110, 7), forward=PerRow(30)) == expected


def test_a_reference_that_is_moved_in_counts_in_its_own_pass() -> None:
    settings = {"held": PerRow(100), "forward": PerRow(30), "moved": 50}
    beside = TrainingShape(4, reference_rows=4)
    assert beside.activations(peak=PerRow(110), **settings) == 4 * 100 + 4 * 30 + 50
    # The backward pass has no reference beside it, so where that is the peak the reference costs nothing.
    assert beside.activations(peak=PerRow(200), **settings) == 4 * 200
    before = TrainingShape(1, prepass_rows=16)
    assert before.activations(peak=PerRow(110), **settings) == 16 * 30 + 50


def test_a_card_is_not_full_to_the_last_byte() -> None:
    assert fits(int(0.92 * 24 * GIB) - CONTEXT, 24)
    assert not fits(int(0.92 * 24 * GIB) - CONTEXT + 1, 24)
