"""The Jinja templates of this folder, and how they write numbers."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

HERE = Path(__file__).parent
UNKNOWN = "unknown"
"""In place of a number that is not known, such as the end of an interval over one prompt."""


def percent(value: float) -> str:
    """0.6625 as 66.2%."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:.1f}%"


def small(value: float) -> str:
    """A p-value with its sign of relation: "= 0.013" or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def digits(value: float, count: int = 3) -> str:
    """A number with `count` significant digits, trailing zeros kept: 10.0, 0.250, 1230."""
    if math.isnan(value):
        return UNKNOWN
    text = f"{value:#.{count}g}".rstrip(".")
    return f"{float(text):.0f}" if "e+0" in text else text


def signed(value: float) -> str:
    """A difference with its sign."""
    if math.isnan(value):
        return UNKNOWN
    return f"{value:+.2f}" if abs(value) >= 0.1 else f"{value:+.2g}"


def points(value: float) -> str:
    """A difference of shares in percentage points: 0.0525 as +5.3."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:+.1f}"


def between(low: float, high: float, write: Callable[[float], str] = digits, what: str = "") -> str:
    """The ends of an interval: "95% 0.10 to 0.30"; what rests on one prompt has none."""
    return "one prompt, no interval" if math.isnan(low) else f"95% {what}{write(low)} to {write(high)}"


def brief(text: str) -> str:
    """A text with hashes cut to twelve characters, which still tell two apart."""
    return re.sub(r"\b[0-9a-f]{32,64}\b", lambda found: found[0][:12], text)


def count(value: float | None) -> str:
    """1234 as 1,234."""
    return "not recorded" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A duration, in seconds or minutes."""
    if value is None:
        return "not recorded"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


@functools.cache
def template(name: str) -> Template:
    """A template, compiled once per process; HTML is escaped, and an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not name.endswith(".html.j2"),
    )
    filters = (percent, small, digits, signed, points, brief, count, seconds, repr)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)
