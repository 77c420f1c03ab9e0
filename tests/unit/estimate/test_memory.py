"""The arithmetic of memory, on numbers that can be added by hand."""

from __future__ import annotations

import pytest

from diffexpo.estimate.memory import (
    CONTEXT,
    GIB,
    Item,
    PerRow,
    TrainingShape,
    drawing_items,
    fits,
    largest_phase,
    peak_bytes,
    phase_bytes,
    training_items,
)


def test_the_peak_is_what_stays_and_the_largest_phase() -> None:
    items = [Item("a", "", 3), Item("b", "", 5, "train"), Item("c", "", 4, "draw"), Item("d", "", 2, "draw")]
    assert largest_phase(items) == "draw"
    assert peak_bytes(items) == 3 + 6
    assert phase_bytes(items, "always") == 3


def test_training_holds_gradients_moments_and_average() -> None:
    nothing = PerRow(0)
    items = training_items(
        10, has_average=True, held=nothing, peak=nothing, forward=nothing, shape=TrainingShape(1)
    )
    assert phase_bytes(items, "train") == 4 * 10 + 8 * 10 + 4 * 10
    items = training_items(
        10, has_average=False, held=nothing, peak=nothing, forward=nothing, shape=TrainingShape(1)
    )
    assert phase_bytes(items, "train") == 12 * 10


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
    items = training_items(
        0, has_average=False, held=PerRow(100, 7), peak=PerRow(110, 7), forward=PerRow(30), shape=shape
    )
    assert phase_bytes(items, "train") == expected


def test_a_reference_that_is_moved_in_counts_in_its_own_pass() -> None:
    settings = {"has_average": False, "held": PerRow(100), "forward": PerRow(30), "moved": 50}
    items = training_items(0, peak=PerRow(110), shape=TrainingShape(4, reference_rows=4), **settings)
    assert phase_bytes(items, "train") == 4 * 100 + 4 * 30 + 50
    # The backward pass has no reference beside it, so where that is the peak the reference costs nothing.
    items = training_items(0, peak=PerRow(200), shape=TrainingShape(4, reference_rows=4), **settings)
    assert phase_bytes(items, "train") == 4 * 200
    items = training_items(0, peak=PerRow(110), shape=TrainingShape(1, prepass_rows=16), **settings)
    assert phase_bytes(items, "train") == 16 * 30 + 50


def test_drawing_counts_the_copy_that_draws_and_merged_weights() -> None:
    settings = {
        "forward": PerRow(10),
        "decoder": PerRow(50),
        "image": 3,
        "rows_per_image": 2,
        "is_sliced": False,
    }
    items = drawing_items(8, moved=7, merged=5, **settings)
    assert phase_bytes(items, "draw") == 16 * 10 + 7 + 5 and phase_bytes(items, "decode") == 8 * 50 + 7


def test_drawing_counts_two_rows_for_guidance_and_one_picture_for_slices() -> None:
    settings = {"forward": PerRow(10), "decoder": PerRow(50), "image": 3}
    items = drawing_items(8, rows_per_image=2, is_sliced=False, **settings)
    assert phase_bytes(items, "draw") == 16 * 10 and phase_bytes(items, "decode") == 8 * 50
    items = drawing_items(8, rows_per_image=1, is_sliced=True, **settings)
    assert phase_bytes(items, "draw") == 8 * 10 and phase_bytes(items, "decode") == 50 + 8 * 3


def test_a_card_is_not_full_to_the_last_byte() -> None:
    assert fits(int(0.92 * 24 * GIB) - CONTEXT, 24)
    assert not fits(int(0.92 * 24 * GIB) - CONTEXT + 1, 24)
