"""What a cell of a foreign table means, whatever type its format gave it: CSV knows texts alone, pandas
writes categories, truth values and floats where a value is missing, databases write decimals."""

from __future__ import annotations

import math
from decimal import Decimal

_FALSE = ("false", "f", "no", "n")


def number_of(value: object) -> float | None:
    """The number that a cell holds: 1, 1.0, "1.0", True and Decimal("1") are 1.0; None for anything else, and
    for what is not finite."""
    if not isinstance(value, (bool, int, float, Decimal, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, or blank text."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_false(value: object) -> bool:
    """Whether a cell says no: False, 0, 0.0, "0.0" or "false"; a cell that is empty says nothing."""
    if isinstance(value, str) and value.strip().lower() in _FALSE:
        return True
    return number_of(value) == 0.0


def text_of_id(value: object) -> str | None:
    """An id as text: 7, 7.0 (an integer column with gaps), Decimal("7") and "7" are "7"; None for an empty
    cell and for what is no id."""
    if is_empty(value) or isinstance(value, bool):
        return None
    if isinstance(value, (float, Decimal)):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    return str(value) if isinstance(value, (int, str)) else None
