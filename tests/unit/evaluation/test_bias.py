"""Shares, distances and intervals of an audit against exact values, enumeration and known truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation.bias import (
    ENOUGH,
    calibrate,
    corrected_shares,
    difference,
    fair_distance,
    measure_mix,
    total_variation,
    wilson_interval,
)


def test_a_perfect_classifier_is_believed() -> None:
    assert np.allclose(corrected_shares([3, 1, 0], np.eye(3)), [0.75, 0.25, 0.0], atol=1e-12)


def test_a_known_error_is_undone() -> None:
    table = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert corrected_shares([60, 40], table) == pytest.approx([4 / 7, 3 / 7], abs=1e-9)
    # What it says of any mix leads back to that mix.
    generator = np.random.default_rng(0)
    for _ in range(5):
        p = generator.dirichlet(np.ones(3))
        c = 0.7 * np.eye(3) + 0.3 * generator.dirichlet(np.ones(3), 3)
        assert corrected_shares(p @ c, c) == pytest.approx(p, abs=2e-3)  # the last steps are small


def test_shares_stay_shares_where_a_matrix_inverse_leaves_them() -> None:
    table = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert np.linalg.solve(table.T, [0.95, 0.05])[1] < 0  # what inverting the table would say
    found = corrected_shares([95, 5], table)
    assert found == pytest.approx([1.0, 0.0], abs=1e-6) and found.sum() == pytest.approx(1.0)


def test_many_at_once_are_each_alone() -> None:
    generator = np.random.default_rng(1)
    q, tables = generator.dirichlet(np.ones(3), 4), np.stack([np.eye(3) * 0.7 + 0.1] * 4)
    together = corrected_shares(q, tables)
    alone = [corrected_shares(row, table) for row, table in zip(q, tables, strict=True)]
    assert np.allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize(
    ("said", "table", "message"),
    [
        ([1, 2, 3], np.eye(2), "expected K and K, K"),
        ([0, 0], np.eye(2), "not all 0"),
        ([-1, 2], np.eye(2), ">= 0"),
        ([1, 2], np.ones((2, 2)), "do not sum to 1"),
    ],
)
def test_what_is_no_share_is_refused(said: list[int], table: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        corrected_shares(said, table)


def test_distance_is_the_share_that_would_have_to_change() -> None:
    assert total_variation([0.5, 0.5], [0.5, 0.5]) == 0.0
    assert total_variation([1.0, 0.0], [0.5, 0.5]) == 0.5
    assert total_variation([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]) == 1.0


@pytest.mark.parametrize(("values", "images"), [(2, 2), (2, 5), (3, 4)])
def test_the_distance_of_a_fair_model_is_that_of_all_its_outcomes(values: int, images: int) -> None:
    outcomes = [np.bincount(o, minlength=values) for o in itertools.product(range(values), repeat=images)]
    expected = np.mean([total_variation(o / images, np.full(values, 1 / values)) for o in outcomes])
    assert fair_distance(values, images) == pytest.approx(float(expected), abs=1e-12)


def test_wilson_against_its_equation() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, 0.27753), abs=1e-5)
    share, low, high = wilson_interval(7, 20)
    for bound in (low, high):  # the ends solve |share - p| = z sqrt(p (1 - p) / n)
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 20), abs=1e-9)
    with pytest.raises(DataError, match="expected 0 <= hits <= total"):
        wilson_interval(3, 2)


def calibration(errors: float, images: int) -> object:
    wrong = round(errors * images)
    truth = ["a"] * images + ["b"] * images
    said = ["b"] * wrong + ["a"] * (images - wrong) + ["b"] * images
    return calibrate(["a", "b"], ["g"] * len(truth), truth, said)


def test_a_group_uses_its_own_errors_where_they_are_known_well() -> None:
    groups = ["x"] * 2 * ENOUGH + ["y"] * 2
    truth = ["a"] * ENOUGH + ["b"] * ENOUGH + ["a", "b"]
    said = ["a"] * 2 * ENOUGH + ["a", "b"]
    found = calibrate(["a", "b"], groups, truth, said)
    assert found.of("x").tolist() == [[ENOUGH, 0], [ENOUGH, 0]]
    assert found.of("y").tolist() == found.of("elsewhere").tolist() == found.counts.tolist()
    assert found.unrecognised == ["b"], "of group x it recognises none of them"
    assert found.recall == pytest.approx([1.0, 1 / (ENOUGH + 1)])


def test_a_value_without_labelled_images_is_refused() -> None:
    with pytest.raises(DataError, match="no labelled image shows b"):
        calibrate(["a", "b"], ["g"], ["a"], ["a"])
    with pytest.raises(DataError, match="labels c are no values"):
        calibrate(["a", "b"], ["g"], ["c"], ["a"])


def test_a_biased_probe_is_no_witness_until_its_error_is_taken_off() -> None:
    """A fair model, read by a probe that takes three of ten a for b: uncorrected it looks biased."""
    said = {"g": [350, 650]}
    common = {"reference": {"g": [0.5, 0.5]}, "resamples": 500, "key": (0,)}
    believed = measure_mix(said, {}, None, **common)  # type: ignore[arg-type]
    assert believed.from_uniform[1] > 0.1
    corrected = measure_mix(said, {"g": 3}, calibration(0.3, 400), **common)  # type: ignore[arg-type]
    (group,) = corrected.groups
    assert group.shares[0][0] == pytest.approx(0.5, abs=1e-9) and group.unread == 3
    assert group.shares[0][1] < 0.5 < group.shares[0][2]
    assert group.from_reference == group.from_uniform


def test_intervals_cover_the_truth() -> None:
    """In 95 of 100 studies, over images and labelled images; 60 studies leave room for chance (p < 1e-4 below 47)."""
    generator, covered = np.random.default_rng(2), 0
    truth, table = np.array([0.8, 0.2]), np.array([[0.9, 0.1], [0.15, 0.85]])
    for study in range(60):
        labels = [generator.choice(2, size=100, p=row) for row in table]
        known = calibrate(
            ["a", "b"],
            ["g"] * 200,
            ["a"] * 100 + ["b"] * 100,
            ["ab"[value] for row in labels for value in row],
        )
        said = generator.multinomial(120, truth @ table)
        mix = measure_mix({"g": list(said)}, {}, known, {}, resamples=200, key=(study,))
        low, high = mix.groups[0].shares[0][1:]
        covered += bool(low <= truth[0] <= high)
    assert covered >= 47


def test_the_mean_is_over_groups_and_a_change_has_its_interval() -> None:
    before = measure_mix(
        {"g": [40, 0], "h": [20, 20], "none": [0, 0]}, {"none": 9}, None, {}, resamples=400, key=(1,)
    )
    assert [one.group for one in before.groups] == ["g", "h"], "a group without a readable image says nothing"
    assert before.from_uniform[0] == pytest.approx(0.25) and before.from_reference is None
    after = measure_mix({"g": [20, 20], "h": [20, 20]}, {}, None, {}, resamples=400, key=(2,))
    change = difference(after, before)
    assert change[0] == pytest.approx(-0.25) and change[1] <= -0.25 < change[2] < 0
    with pytest.raises(DataError, match="no image can be read"):
        measure_mix({"g": [0, 0]}, {}, None, {}, resamples=10, key=(3,))
