"""Figures of pages: inline SVG whose colours are CSS variables, so that they follow light and dark mode.

A figure without data becomes a sentence that says why.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffexpo.evaluation.templates import HERE

Estimate = tuple[float, float, float]
Plot = Callable[[Axes], str]
"""Draws on axes and says in words what it drew."""
# Colours of the figures and the CSS variables that take their place.
TEXT, CARD, LINE = "#111213", "#fefdfc", "#c8c9ca"
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#d98c00", "#009e73", "#d55e00", "#76777a"
PINK = "#c45a9b"
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK)
"""Colours of the things that a figure compares, in order."""
NAMES = {
    CARD: "card",
    LINE: "line",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    RED: "red",
    GREY: "grey",
    PINK: "pink",
}
LEGEND_WIDTH = 58  # Characters of a line of the legend that fit, each entry's mark counted as six.
VARIABLES = {TEXT: "currentColor"} | {colour: f"var(--{name})" for colour, name in NAMES.items()}


class Absent(Exception):
    """Raised by a figure whose data are not there; its text says what is absent and why."""


def draw_figure(name: str, figure: Plot) -> dict[str, Markup | str]:
    """A figure as themed inline `svg`, or the sentence that stands in its place (`absent`)."""
    with matplotlib.style.context([HERE / "figures.mplstyle", {"svg.hashsalt": name}]):
        canvas = Figure(figsize=(3.8, 2.6))
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        try:
            alt = figure(axes)
        except Absent as reason:
            return {"absent": str(reason)}
        add_legend(axes)
        fit(canvas, axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return {"svg": Markup(_theme(buffer.getvalue(), alt))}


def add_legend(axes: Axes) -> None:
    """The legend above the plot, never over what it shows, in as many columns as the figure's width takes."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    columns = next((n for n in (len(labels), 2) if n * (max(map(len, labels)) + 6) <= LEGEND_WIDTH), 1)
    place: dict[str, Any] = {"bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(loc="lower left", ncols=columns, handlelength=1.6, columnspacing=1.2, **place)


def fit(canvas: Figure, axes: Axes, margin: float = 0.02) -> None:
    """Let the axes with all their labels fill the figure; matplotlib's own layouts draw everything twice."""
    box, inner = axes.get_tightbbox(), axes.get_position()
    assert box is not None
    outer = box.transformed(canvas.transFigure.inverted())
    corner = (inner.x0 - outer.x0 + margin, inner.y0 - outer.y0 + margin)
    size = (inner.width - outer.width + 1 - 2 * margin, inner.height - outer.height + 1 - 2 * margin)
    axes.set_position((*corner, *size))


def _theme(svg: str, alt: str) -> str:
    """Only the <svg> element, with CSS variables for colours, no fixed size, and a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)


def spread_of(estimate: Estimate) -> list[list[float]]:
    """An interval as matplotlib wants its error bars: lengths below and above the mean."""
    mean, low, high = estimate
    return [[mean - low], [high - mean]]
