"""What several losses refuse in the same words."""

from __future__ import annotations


def check_above_zero(function: str, **settings: float) -> None:
    """Refuse settings of a function that are not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{function}: {name} is {value}; expected a number above 0")


def check_known(function: str, known: tuple[str, ...], **settings: str) -> None:
    """Refuse settings of a function that are none of the known names."""
    for name, value in settings.items():
        if value not in known:
            expected = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ValueError(f"{function}: {name} is {value!r}; expected {expected}")
