"""Epochs draw by weight without replacement, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from diffexpo.data.draws import Epochs


def test_weights_are_exact_frequencies_without_replacement() -> None:
    weights = np.array([1.0] * 30 + [0.5] * 40 + [0.05] * 20)
    epochs = Epochs(weights, (0, "test"))
    assert epochs.length == 51
    rounds = 4000
    drawn = np.array([index for index, _ in epochs.take(0, rounds * 51)]).reshape(rounds, 51)
    assert all(len(set(epoch)) == 51 for epoch in drawn[:500])
    counts = np.bincount(drawn.ravel(), minlength=90) / rounds
    for group, share in ((slice(0, 30), 1.0), (slice(30, 70), 0.5), (slice(70, 90), 0.05)):
        error = np.sqrt(share * (1 - share) / rounds / (group.stop - group.start)) + 1e-12
        assert abs(counts[group].mean() - share) < 4 * error
        assert np.abs(counts[group] - share).max() < 5 * np.sqrt(share * (1 - share) / rounds) + 1e-12
    first = np.bincount(drawn[:, 0], minlength=90) / rounds * 51  # no position prefers a kind
    assert abs(first[:30].mean() - 1.0) < 0.1


@pytest.mark.parametrize("weight", [0.1, 0.7, 1 / 3, 1e-30, 1e30])
def test_equal_weights_lose_no_pair_to_rounding(weight: float) -> None:
    epochs = Epochs(np.full(10, weight), (0, "test"))
    assert sorted(index for index, _ in epochs.take(10, 20)) == list(range(10))
