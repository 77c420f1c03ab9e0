"""Signal and noise of margins against closed forms: exact on made-up tables, and unbiased on drawn ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffexpo.diffusion import margin_signal


def drawn(num_pairs: int, draws: int, signal: float, noise: float, seed: int = 0) -> Tensor:
    """Margins whose pairs have means N(0, signal^2), and N(0, noise^2) around them."""
    generator = torch.Generator().manual_seed(seed)
    own = signal * torch.randn(num_pairs, 1, generator=generator, dtype=torch.float64)
    return own + noise * torch.randn(num_pairs, draws, generator=generator, dtype=torch.float64)


def test_two_draws_around_known_means_have_the_signal_and_noise_of_the_formula() -> None:
    means, away = torch.tensor([3.0, -1.0, 2.0]), 0.5
    found = margin_signal(torch.stack([means + away, means - away], dim=1))
    # The variance of a + d and a - d is 2 d^2, and the mean of squares 14 / 3 holds d^2 of it.
    assert found.noise == pytest.approx(math.sqrt(2 * away**2), rel=1e-12)
    assert found.signal == pytest.approx(math.sqrt(14 / 3 - away**2), rel=1e-12)
    assert found.ratio == pytest.approx(found.signal / found.noise, rel=1e-12)


def test_pairs_that_cancel_in_the_mean_are_signal_all_the_same() -> None:
    found = margin_signal(torch.tensor([[1.0, 1.1], [-1.0, -1.1]]))
    assert found.ratio > 10 and found.low > 10


def test_the_number_of_draws_does_not_move_the_squares() -> None:
    # Four standard errors or more: of the noise 0.7% and 0.3%, of the signal 6% and 2%.
    for draws, bound in ((2, 0.25), (8, 0.1)):
        found = margin_signal(drawn(40_000, draws, 0.6, 2.0))
        assert found.noise**2 == pytest.approx(4.0, rel=0.05)
        assert found.signal**2 == pytest.approx(0.36, rel=bound)


def test_a_mean_of_four_draws_has_twice_the_ratio_of_one() -> None:
    margins = drawn(20_000, 32, 0.5, 2.0)
    one, four = margin_signal(margins), margin_signal(margins.reshape(20_000, 8, 4).mean(dim=2))
    assert one.ratio == pytest.approx(0.25, rel=0.05) and four.ratio == pytest.approx(2 * one.ratio, rel=0.05)
    # So 1 / ratio^2 = 16 draws make signal and noise equal.
    sixteen = margin_signal(margins.reshape(20_000, 2, 16).mean(dim=2))
    assert sixteen.ratio == pytest.approx(1.0, rel=0.05)


def test_noise_alone_has_no_signal_and_an_interval_that_begins_at_0() -> None:
    found = [margin_signal(drawn(32, 8, 0.0, 1.0, seed)) for seed in range(40)]
    # A negative estimate of the square is 0: that happens in half of the cases.
    assert 8 <= sum(each.signal == 0 for each in found) <= 32
    assert sum(each.low == 0 for each in found) >= 36


def test_the_interval_holds_the_truth() -> None:
    found = [margin_signal(drawn(64, 8, 0.5, 1.0, seed), ("cover", seed)) for seed in range(100)]
    held = sum(each.low <= 0.5 <= each.high for each in found)
    # A bootstrap over 64 pairs holds a little less than its 95%; 83 of 100 would have probability 1e-5 at 95%.
    assert held >= 84
    assert all(each.low <= each.ratio <= each.high for each in found)


def test_the_same_key_gives_the_same_interval_and_another_key_another_one() -> None:
    margins = drawn(16, 4, 0.5, 1.0)
    assert margin_signal(margins, ("a",)) == margin_signal(margins, ("a",))
    one, other = margin_signal(margins, ("a",)), margin_signal(margins, ("b",))
    assert (one.signal, one.noise) == (other.signal, other.noise) and one.low != other.low


def test_margins_without_noise_have_no_ratio() -> None:
    found = margin_signal(torch.zeros(4, 3))
    assert (found.signal, found.noise) == (0, 0)
    assert math.isnan(found.ratio) and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (8,)])
def test_too_few_pairs_or_draws_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(P, K\\), both >= 2"):
        margin_signal(torch.zeros(shape))
