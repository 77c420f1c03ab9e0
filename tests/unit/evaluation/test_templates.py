"""How numbers are written on pages: as many digits as were asked for, no exponent where a reader wants none."""

from __future__ import annotations

import math

import pytest

from diffexpo.evaluation.templates import UNKNOWN, between, digits, percent, points, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.250"),
        (10.0, "10.0"),
        (123.4, "123"),
        (1234.0, "1230"),
        (1643.2, "1640"),
        (-98765.0, "-98800"),
        (1.5e-5, "1.50e-05"),
        (1.5e12, "1.50e+12"),
        (math.nan, UNKNOWN),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_differences_of_shares_are_points_with_their_sign() -> None:
    assert (points(0.0525), points(-0.2), points(0.0)) == ("+5.2", "-20.0", "+0.0")
    assert percent(0.6625) == "66.2%"
    assert between(0.01, 0.2, points, "interval ") == "95% interval +1.0 to +20.0"


def test_what_rests_on_one_prompt_has_no_interval() -> None:
    assert between(math.nan, math.nan) == "one prompt, no interval"
    assert {points(math.nan), percent(math.nan), signed(math.nan)} == {UNKNOWN}
