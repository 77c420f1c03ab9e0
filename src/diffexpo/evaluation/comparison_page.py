"""The page of a comparison of runs: HTML, Markdown, CSV and JSON of the same numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

import diffexpo
from diffexpo.bounded.images import read_image
from diffexpo.evaluation.comparison import ComparedRun, Point, RunComparison
from diffexpo.evaluation.figures import GREY, PALETTE, TEXT, Absent, draw_figure, spread_of
from diffexpo.evaluation.grid import data_uri
from diffexpo.evaluation.records import Json, image_path, load_suite
from diffexpo.evaluation.run_groups import BASE
from diffexpo.evaluation.statistics import Estimate
from diffexpo.evaluation.templates import HERE, UNKNOWN, digits, percent, signed, template
from diffexpo.files import write_json, write_text

FILES = ("comparison.html", "comparison.md", "comparison.csv", "comparison.json")
PICTURES = 6
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = (
    *("run", "group", "seed", "state", "iteration", "is_result", "network_evaluations", "judge"),
    *(f"{name}{end}" for name in ("score", "gain", "rate", "kl", "vendi") for end in ("", "_low", "_high")),
)


def write_comparison(comparison: RunComparison, folder: Path) -> list[Path]:
    """Write `comparison.html`, `.md`, `.csv` (a row for each iterate of each run) and `.json` into a folder.

    Returns their paths; the same runs give the same bytes.
    """
    paths = [folder / name for name in FILES]
    values = page_values(comparison)
    style = (HERE / "report.css").read_text(encoding="utf-8")
    page = template("comparison.html.j2").render(values, style=Markup(style), figures=figures_of(comparison))
    write_text(paths[0], page)
    write_text(paths[1], template("comparison.md.j2").render(values))
    write_text(paths[2], as_csv(comparison))
    write_json(paths[3], comparison.to_json())
    return paths


def page_values(comparison: RunComparison) -> Json:
    """Everything that the templates show except figures."""
    write = _Writer(comparison.is_share)
    return {
        "version": diffexpo.__version__,
        "it": comparison,
        "sentences": sentences(comparison),
        "write": write,
        "pictures": _pictures(comparison),
        "couples": list(zip(comparison.comparisons, comparison.power, strict=True)),
        "single": [group.label for group in comparison.groups if len(group.runs) == 1],
        "double": [group.label for group in comparison.groups if len(group.runs) == 2],
    }


def sentences(comparison: RunComparison) -> list[str]:
    """What the comparison comes to, in plain words: results against their base, then against each other."""
    if not comparison.comparisons:
        return ["No run has been evaluated yet, so there is nothing to compare. Settings are below."]
    write, found = _Writer(comparison.is_share), []
    for one in comparison.comparisons:
        if one.second in comparison.contenders and not one.second.startswith(f"{BASE} of "):
            continue  # it is in the table
        words = {"better": "is better than", "worse": "is worse than"}.get(one.verdict)
        gap = f"{write.gap(one.difference)}, win rate {percent(one.rate[0])}"
        if words is None:
            found.append(f"{one.first} and {one.second} cannot be told apart here ({gap}).")
        else:
            found.append(f"{one.first} {words} {one.second} ({gap}).")
    return found


def as_csv(comparison: RunComparison) -> str:
    """A row for each iterate of each run, 0 the base; empty where something was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group, run in comparison.runs:
        for point in run.points:
            estimates = (point.score, point.gain, point.rate, point.kl, point.vendi)
            numbers = [_cell(value) for estimate in estimates for value in estimate or (None,) * 3]
            is_result = point.iteration == run.result
            spent = _cell(point.evaluations)
            row = [run.name, group.label, run.seed, run.state, point.iteration, is_result, spent]
            writer.writerow([*row, comparison.judge, *numbers])
    return text.getvalue()


def figures_of(comparison: RunComparison) -> dict[str, dict[str, Markup | str]]:
    """The curves: the score over network evaluations and over KL, and diversity."""
    plots = {"spent": _over_cost, "frontier": _over_kl, "vendi": _vendi}
    return {
        name: draw_figure(f"comparison {name}", partial(plot, comparison=comparison))
        for name, plot in plots.items()
    }


class _Writer:
    """Scores as they are shown: percent where the judge says right or wrong, else its own unit."""

    def __init__(self, is_share: bool) -> None:
        self.is_share = is_share

    def score(self, estimate: Estimate | None) -> str:
        """A mean."""
        if estimate is None:
            return "-"
        return percent(estimate[0]) if self.is_share else digits(estimate[0], 4)

    def ends(self, estimate: Estimate | None) -> str:
        """The interval of a mean; that of a share does not leave 0 to 1."""
        if self.is_share:
            return self._ends(estimate, lambda share: percent(min(max(share, 0.0), 1.0)))
        return self._ends(estimate, lambda value: digits(value, 4))

    def change(self, estimate: Estimate | None) -> str:
        """A difference, in points or in the judge's unit."""
        return "-" if estimate is None else self._signed(estimate[0])

    def change_ends(self, estimate: Estimate | None) -> str:
        """The interval of a difference."""
        return self._ends(estimate, self._signed)

    def plain(self, value: float) -> str:
        """A difference without its sign."""
        return f"{100 * value:.1f} points" if self.is_share else digits(value, 3)

    def gap(self, estimate: Estimate) -> str:
        """A difference with its interval, in a sentence."""
        unit = " points" if self.is_share else ""
        ends = self.change_ends(estimate)
        return f"{self.change(estimate)}{unit}, 95% interval {ends[1:-1].replace(', ', ' to ')}"

    def rate(self, estimate: Estimate | None) -> str:
        """A win rate."""
        return "-" if estimate is None else percent(estimate[0])

    def rate_ends(self, estimate: Estimate | None) -> str:
        """The interval of a win rate."""
        return self._ends(estimate, percent)

    def _signed(self, value: float) -> str:
        if math.isnan(value):
            return UNKNOWN
        return f"{100 * value:+.1f}" if self.is_share else signed(value)

    @staticmethod
    def _ends(estimate: Estimate | None, write: Callable[[float], str]) -> str:
        if estimate is None:
            return ""
        if math.isnan(estimate[1]):
            return "[no interval]"
        return f"[{write(estimate[1])}, {write(estimate[2])}]"


# ---- figures ----------------------------------------------------------------------------------------------


def _over_cost(axes: Axes, comparison: RunComparison) -> str:
    return _curves(
        axes, comparison, "evaluations", "network evaluations until the iterate", "no cost recorded"
    )


def _over_kl(axes: Axes, comparison: RunComparison) -> str:
    said = _curves(axes, comparison, "kl", "KL to the base (nats per image)", "evaluation.kl_prompts is 0")
    points = [_where(comparison, label, iteration) for label, iteration in comparison.frontier]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=GREY, linestyle=":", linewidth=1.2, label="frontier", zorder=1)
    return said


def _where(comparison: RunComparison, label: str, iteration: int) -> tuple[float, float]:
    groups = [group for group in comparison.groups if label in (BASE, group.label)]
    point = next(one for group in groups for one in group.points if one.iteration == iteration)
    assert point.kl is not None and point.score is not None  # that is how it came to the frontier
    return point.kl[0], point.score[0]


def _curves(axes: Axes, comparison: RunComparison, name: str, xlabel: str, absent: str) -> str:
    """Mean scores of each group over what `name` measures of its iterates; seeds are thin lines."""
    said = []
    for group, colour, marker in zip(comparison.groups, cycle(PALETTE), cycle(MARKERS), strict=False):
        placed = _placed(group.points, name)
        if len(placed) < 2:
            continue
        if len(group.runs) > 1:
            for run in group.runs:
                own = _placed(run.points, name)
                axes.plot(
                    [x for x, _ in own], [y[0] for _, y in own], color=colour, alpha=0.45, linewidth=0.8
                )
        x, mean = [x for x, _ in placed], np.array([y[0] for _, y in placed])
        low, high = (np.array([y[end] for _, y in placed]) for end in (1, 2))
        if comparison.is_share:
            low, high = low.clip(0, 1), high.clip(0, 1)
        axes.plot(x, mean, color=colour, marker=marker, label=_cut(group.label))
        if np.isfinite(low).all():
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        said.append(f"{group.label}: {', '.join(f'{value:.3g}' for value in mean)}")
    if not said:
        raise Absent(f"No iterate to draw: nothing but the base is evaluated, or {absent}.")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"mean {comparison.judge}")
    if comparison.is_share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if name == "evaluations":
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.margins(x=0.06)
    return f"{comparison.judge} over {xlabel}. " + "; ".join(said)


def _vendi(axes: Axes, comparison: RunComparison) -> str:
    bars = [(group.label, group.result.vendi) for group in comparison.groups if group.result]
    base = None if comparison.base is None else comparison.base.vendi
    shown = [(label, vendi) for label, vendi in ((BASE, base), *bars) if vendi is not None]
    if not shown:
        raise Absent("No Vendi score: evaluation.vendi_prompts is 0, or vendi_images is 1.")
    for place, ((label, vendi), colour) in enumerate(zip(shown, cycle((GREY, *PALETTE)), strict=False)):
        spread = spread_of(vendi) if np.isfinite(vendi[1]) else None
        axes.barh(place, vendi[0], 0.6, xerr=spread, color=colour, capsize=3, ecolor=TEXT)
    axes.set_yticks(range(len(shown)), [_cut(label) for label, _ in shown])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=1)
    axes.set_xlabel("Vendi score of the images of a prompt")
    return "Vendi score. " + "; ".join(f"{label}: {vendi[0]:.2f}" for label, vendi in shown)


def _placed(points: Sequence[Point], name: str) -> list[tuple[float, Estimate]]:
    """(x, score) of the iterates that have both, in order."""
    found = []
    for point in points:
        x = point.evaluations if name == "evaluations" else point.kl and point.kl[0]
        if x is not None and point.score is not None:
            found.append((float(x), point.score))
    return found


def _cut(label: str, most: int = 26) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}\u2026"


def _thousands(value: float, _: object) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.10g}"


# ---- pictures ---------------------------------------------------------------------------------------------


def _pictures(comparison: RunComparison) -> list[Json]:
    """Cards of the first prompts that all results share: the base, then each group's first run."""
    shown = [(group, group.runs[0]) for group in comparison.groups if group.runs[0].result is not None]
    if not shown:
        return []
    first = shown[0][1]
    columns = [(BASE, first, 0), *((group.label, run, run.result or 0) for group, run in shown)]
    suites = [load_suite(_folder(run, number), with_images=False) for _, run, number in columns]
    shared = [p for p in suites[0].prompts if all(suite.row_of(p.id) is not None for suite in suites)]
    cards = []
    for prompt in shared[:PICTURES]:
        sides = []
        for (label, run, number), suite in zip(columns, suites, strict=True):
            row = suite.row_of(prompt.id)
            assert row is not None  # the prompt is shared
            path, score = image_path(_folder(run, number), row), suite.scores[comparison.judge][row]
            told = f"{score:.2f}" if np.isfinite(score) else "not scored"
            uri = data_uri(read_image(path)) if path.is_file() else ""
            sides.append({"label": label, "uri": uri, "score": told})
        cards.append({"prompt": prompt.text, "sides": sides})
    return cards


def _folder(run: ComparedRun, iteration: int) -> Path:
    return Path(run.folder) / "eval" / (BASE if iteration == 0 else f"iteration-{iteration}")
