"""report.html: one self-contained page that says whether the model got better, made from a run's files alone.

The only file that plots (`page.py` makes the rest of the page). Figures are inline SVG whose colours are CSS
variables, so they follow light and dark mode; a figure whose data are absent becomes a sentence that says
why, and one that the run's method does not have is left out.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diffexpo.evaluation.page import count, page_values, pairing_rows, seconds
from diffexpo.evaluation.records import RunRecord, load_run, series
from diffexpo.evaluation.summary import BASELINE, Estimate, Summary, summarise
from diffexpo.evaluation.verdict import digits, percent, signed, small
from diffexpo.files import write_text

HERE = Path(__file__).parent

CARD = "#fefdfc"
TEXT, LINE, BLUE, ORANGE, GREEN, RED, GREY = (
    "#111213",
    "#c8c9ca",
    "#0072b2",
    "#d98c00",
    "#009e73",
    "#d55e00",
    "#76777a",
)
VARIABLES = {TEXT: "currentColor", CARD: "var(--card)", LINE: "var(--line)"} | {
    colour: f"var(--{name})"
    for name, colour in (("blue", BLUE), ("orange", ORANGE), ("green", GREEN), ("red", RED), ("grey", GREY))
}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "legend.facecolor": CARD,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "path.simplify_threshold": 0.5,
}
MAX_POINTS = 120


@dataclass(frozen=True)
class Drawing:
    """A figure as inline SVG, or the sentence that stands in its place."""

    svg: Markup | None = None
    absent: str = ""


class Absent(Exception):
    """Raised by a figure whose data are not there; its text says what is absent and why."""


def write_report(run_dir: Path) -> Path:
    """Write `<run>/report.html` and the before/after sheet `<run>/eval/grid.png`.

    Args:
        run_dir: A run folder; unfinished runs are fine.
    Returns:
        Path of the page. The same files give the same bytes.
    Raises:
        MissingError: the folder is not a run. DataError: one of its files is damaged.
    """
    run_dir = Path(run_dir)
    record = load_run(run_dir)
    summary = summarise(record)
    page = _template().render(
        page_values(record, summary),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        figures={
            name: _draw(name, figure, record, summary)
            for name, figure in FIGURES.items()
            if _has(name, record, summary)
        },
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


@functools.cache
def _template() -> Template:
    """The page, compiled once a process."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "small": small,
        "signed": signed,
        "digits": digits,
        "count": count,
        "seconds": seconds,
    }
    return environment.get_template("report.html.j2")


# ---- figures
# ---------------------------------------------------------------------------------------------------------


def _has(name: str, record: RunRecord, summary: Summary) -> bool:
    """Whether a run of this method has the figure at all."""
    method = summary.method
    trained = [line for line in record.metrics if line.get("phase") == "train"]
    if name in METRICS and trained:
        return any(METRICS[name] in line for line in trained)
    ranked_pairs = method.collects and method.has_pairs and method.is_ranked
    return {
        "train_reward": method.has_rewards,
        "accuracy": method.has_pairs,
        "errors": method.has_pairs,
        "clipping": method.is_rollout,
        "tau": method.has_negatives,
        "who_won": ranked_pairs and (method.has_agents or method.has_negatives),
        "agents": method.collects and method.has_rewards,
        "kept": ranked_pairs,
    }.get(name, True)


def _draw(
    name: str, figure: Callable[[Axes, RunRecord, Summary], str], record: RunRecord, summary: Summary
) -> Drawing:
    """Run one figure function on fresh axes and turn the result into themed inline SVG."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        canvas = Figure(figsize=(3.8, 2.6))
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        try:
            alt = figure(axes, record, summary)
        except Absent as reason:
            return Drawing(absent=str(reason))
        _fit(canvas, axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(svg=Markup(_theme(buffer.getvalue(), alt)))


def _fit(canvas: Figure, axes: Axes, margin: float = 0.02) -> None:
    """Let the axes with all their labels fill the figure. Measured once; matplotlib's own layouts measure and
    draw everything twice."""
    outer, inner = axes.get_tightbbox().transformed(canvas.transFigure.inverted()), axes.get_position()
    axes.set_position(
        (
            inner.x0 - outer.x0 + margin,
            inner.y0 - outer.y0 + margin,
            inner.width - outer.width + 1 - 2 * margin,
            inner.height - outer.height + 1 - 2 * margin,
        )
    )


def _theme(svg: str, alt: str) -> str:
    """Only the <svg> element, with CSS variables for colours, no fixed size, and a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    words = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{words}"', 1)


def _iterations(axes: Axes, label: str = "iteration (0 = base)") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.08)
    left, right = axes.get_xlim()
    if right - left < 2:  # a single iterate: no ticks at fractions of an iteration
        middle = round((left + right) / 2)
        axes.set_xlim(middle - 1.5, middle + 1.5)


def _band(axes: Axes, points: Sequence[tuple[int, Estimate]], colour: str, marker: str, label: str) -> None:
    x = [number for number, _ in points]
    mean, low, high = (np.array([estimate[k] for _, estimate in points]) for k in range(3))
    axes.plot(x, mean, color=colour, marker=marker, label=label)
    if len(points) == 1:
        axes.errorbar(x, mean, yerr=[mean - low, high - mean], color=colour, capsize=3)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _by_iteration(values: dict[str, Estimate]) -> list[tuple[int, Estimate]]:
    found = [
        (0 if name == "base" else int(name.split("-")[1]), value)
        for name, value in values.items()
        if name != BASELINE
    ]
    return sorted(found)


def _baseline_mark(axes: Axes, values: dict[str, Estimate], at: float) -> None:
    if BASELINE in values:
        mean, low, high = values[BASELINE]
        axes.errorbar(
            [at],
            [mean],
            yerr=[[mean - low], [high - mean]],
            color=RED,
            marker="D",
            capsize=3,
            label="offline DPO",
        )


def _reward_figure(
    axes: Axes, summary: Summary, scorer: str | None, colour: str, marker: str, kind: str
) -> str:
    if scorer is None:
        raise Absent(f"No {kind} was scored in the evaluation, so there is no reward curve for it.")
    if not summary.rewards.get(scorer):
        raise Absent(f"{scorer} has no finite score in any evaluation, so there is no curve.")
    points = _by_iteration(summary.rewards[scorer])
    _band(axes, points, colour, marker, summary.method.name)
    last = points[-1][0] if points else 0
    _baseline_mark(axes, summary.rewards[scorer], last + 0.15)
    _iterations(axes)
    axes.set_ylabel(f"mean {scorer}")
    axes.legend()
    return f"{scorer} by iteration: " + "; ".join(f"{number}: {value[0]:.3g}" for number, value in points)


def _heldout(axes: Axes, record: RunRecord, summary: Summary) -> str:
    return _reward_figure(axes, summary, summary.judge, BLUE, "o", "held-out judge")


def _train_reward(axes: Axes, record: RunRecord, summary: Summary) -> str:
    return _reward_figure(axes, summary, summary.train_reward, ORANGE, "s", "train reward")


def _win_rate(axes: Axes, record: RunRecord, summary: Summary) -> str:
    if not summary.wins:
        raise Absent(
            "No win rate: it needs a held-out judge, the base model's evaluation and at least one iterate."
        )
    estimates = {name: (win.rate, win.low, win.high) for name, win in summary.wins.items()}
    points = _by_iteration(estimates)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2, label="no difference")
    if points:
        mean, low, high = (np.array([estimate[k] for _, estimate in points]) for k in range(3))
        x = [number for number, _ in points]
        spread = [mean - low, high - mean]
        axes.errorbar(x, mean, yerr=spread, color=BLUE, marker="o", capsize=3, label=summary.method.name)
    _baseline_mark(axes, estimates, (points[-1][0] if points else 0) + 0.15)
    ties = [summary.wins[name].ties for name in summary.wins]
    _iterations(axes, "iteration")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel("win rate vs base")
    axes.legend()
    label = summary.method.label
    listed = "; ".join(f"{label(name)}: {percent(win.rate)}" for name, win in summary.wins.items())
    return f"Win rate against the base. {listed}. Ties: {ties}."


def _frontier(axes: Axes, record: RunRecord, summary: Summary) -> str:
    rewards = summary.rewards.get(summary.judge or "", {})
    shared = [name for name in rewards if name in summary.kl]
    if not shared or "base" not in rewards:
        raise Absent(
            "No reward-KL curve: the KL was not measured (evaluation.kl_prompts is 0) or no judge scored the "
            "images."
        )
    path = [("base", 0.0)] + [(name, summary.kl[name][0]) for name in shared if name != BASELINE]
    axes.plot([kl for _, kl in path], [rewards[name][0] for name, _ in path], color=BLUE, linewidth=1.2)
    for name, kl in path + [(BASELINE, summary.kl[BASELINE][0]) for _ in range(BASELINE in shared)]:
        mean, low, high = rewards[name]
        left, right = (
            (kl - summary.kl[name][1], summary.kl[name][2] - kl) if name in summary.kl else (0.0, 0.0)
        )
        colour, marker = (RED, "D") if name == BASELINE else (BLUE, "o")
        axes.errorbar(
            [kl], [mean], xerr=[[left], [right]], yerr=[[mean - low], [high - mean]], color=colour, marker=marker,
            capsize=2, elinewidth=0.9,
        )  # fmt: skip
        text = summary.method.label(name)
        axes.annotate(text, (kl, mean), textcoords="offset points", xytext=(6, -12), fontsize=8)
    axes.margins(x=0.14)
    axes.set_xlabel("KL to the base (nats per image)")
    axes.set_ylabel(f"mean {summary.judge}")
    return "Held-out reward against KL: " + "; ".join(
        f"{summary.method.label(n)} at {k:.3g} nats: {rewards[n][0]:.3g}" for n, k in path
    )


def _vendi(axes: Axes, record: RunRecord, summary: Summary) -> str:
    if not summary.vendi:
        raise Absent(
            "No Vendi score: evaluation.vendi_prompts is 0, vendi_images is 1, or no embedder was given."
        )
    names = list(summary.vendi)
    for index, name in enumerate(names):
        mean, low, high = summary.vendi[name]
        colour = {"base": GREY, BASELINE: RED}.get(name, BLUE)
        axes.bar(
            index, mean, color=colour, width=0.6, yerr=[[mean - low], [high - mean]], capsize=3, ecolor=TEXT
        )
    limit = max(suite.vendi_images for suite in record.suites.values())
    axes.axhline(limit, color=TEXT, linestyle=":", linewidth=1.2)
    axes.text(-0.4, limit, f"maximum {limit}", va="bottom", fontsize=8)
    axes.set_ylim(1, limit * 1.12)
    axes.set_xticks(range(len(names)), [summary.method.label(name) for name in names])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("Vendi score")
    return f"Vendi score of at most {limit}: " + "; ".join(
        f"{summary.method.label(n)} {summary.vendi[n][0]:.2f}" for n in names
    )


def _training(record: RunRecord, name: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Optimiser steps counted through the run, values thinned to means of equal bins, and where iterations
    begin."""
    lines = [line for line in record.metrics if line.get("phase") == "train"]
    if not series(lines, name, "train"):
        raise Absent(f"No training step with {name} is in metrics.jsonl yet.")
    x = np.array([index for index, line in enumerate(lines, start=1) if series([line], name)])
    y = np.array([value for _, value in series(lines, name, "train")])
    starts = [i for i in range(1, len(lines)) if lines[i].get("iteration") != lines[i - 1].get("iteration")]
    edges = np.linspace(0, len(y), min(len(y), MAX_POINTS) + 1).astype(int)
    bins = list(pairwise(edges))
    return np.array([x[a:b].mean() for a, b in bins]), np.array([y[a:b].mean() for a, b in bins]), starts


def _steps(axes: Axes, starts: Sequence[int]) -> None:
    for start in starts:
        axes.axvline(start + 0.5, color=LINE, linewidth=1.2)
    axes.set_xlabel("optimiser step (vertical lines: new iteration)")


def _loss(axes: Axes, record: RunRecord, summary: Summary) -> str:
    x, y, starts = _training(record, "train/loss")
    axes.plot(x, y, color=BLUE, linewidth=1.3, label="loss")
    start = summary.method.start_loss
    if start is not None:
        axes.axhline(start, color=GREY, linestyle="--", linewidth=1.2, label=f"ln 2 = {start:.3f}")
    _steps(axes, starts)
    axes.set_ylabel("loss" if start is None else "preference loss")
    axes.legend()
    meaning = "" if start is None else "; ln 2 is where policy and reference are equal"
    return f"Training loss from {y[0]:.3f} to {y[-1]:.3f}{meaning}."


def _accuracy(axes: Axes, record: RunRecord, summary: Summary) -> str:
    x, y, starts = _training(record, "train/implicit_accuracy")
    axes.plot(x, y, color=BLUE, linewidth=1.3, label="implicit accuracy")
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2, label="coin flip")
    axes.axhline(0.9, color=RED, linestyle=":", linewidth=1.2, label="alarm level")
    _steps(axes, starts)
    axes.set_ylim(min(0.4, y.min()), 1.0)
    axes.set_ylabel("share ranked right")
    axes.legend()
    return f"Implicit accuracy from {y[0]:.2f} to {y[-1]:.2f}; one half is a coin flip."


def _errors(axes: Axes, record: RunRecord, summary: Summary) -> str:
    said = []
    for side, colour, dash in (("winner", BLUE, "-"), ("loser", ORANGE, "--")):
        x, own, starts = _training(record, f"train/{side}_error")
        _, reference, _ = _training(record, f"train/{side}_reference_error")
        if len(own) != len(reference) or (reference <= 0).any():
            raise Absent(
                "Policy and reference errors in metrics.jsonl do not belong to the same steps, so no ratio "
                "is drawn."
            )
        change = 100 * (own / reference - 1)
        axes.plot(x, change, color=colour, linestyle=dash, linewidth=1.3, label=f"{side}s")
        said.append(f"{side} {change[-1]:+.1f}%")
    axes.axhline(0.0, color=GREY, linestyle="--", linewidth=1.0, label="reference")
    _steps(axes, starts)
    axes.set_ylabel("error vs reference, %")
    axes.legend()
    return "Prediction error relative to the reference at the end: " + ", ".join(said)


def _clipping(axes: Axes, record: RunRecord, summary: Summary) -> str:
    x, y, starts = _training(record, "train/clip_fraction")
    axes.plot(x, y, color=BLUE, linewidth=1.3, label="beyond the clip range")
    _steps(axes, starts)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("share of the batch")
    axes.legend()
    return f"Share of ratios beyond the clip range from {y[0]:.2f} to {y[-1]:.2f}."


def _lines_by_iteration(
    axes: Axes, record: RunRecord, curves: Sequence[tuple[str, str, str, str]], absent: str
) -> str:
    said = []
    for (name, label, colour, marker), dash in zip(curves, ("-", "--", "-.", ":"), strict=False):
        points = series(record.metrics, name)
        if points:
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], dash, color=colour, marker=marker, label=label
            )
            said.append(f"{label}: " + ", ".join(f"{value:.3g}" for _, value in points))
    if not said:
        raise Absent(absent)
    _iterations(axes, "collecting iteration")
    axes.legend()
    return "; ".join(said)


def _tau(axes: Axes, record: RunRecord, summary: Summary) -> str:
    curves = (
        ("explore/tau", "tau (planned)", BLUE, "o"),
        ("rollout/negative_prompt_fraction", "images with a negative prompt", ORANGE, "s"),
    )
    said = _lines_by_iteration(
        axes, record, curves, "No collecting iteration is in metrics.jsonl, so nothing explored yet."
    )
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("share")
    return said


def _who_won(axes: Axes, record: RunRecord, summary: Summary) -> str:
    agents = [
        ("pairs/winner_from_exploration", "winners: exploration agent", BLUE, "o"),
        ("pairs/loser_from_exploration", "losers: exploration agent", ORANGE, "s"),
    ]
    negatives = [("pairs/winner_from_negative", "winners: with negative prompt", GREEN, "^")]
    curves = agents * summary.method.has_agents + negatives * summary.method.has_negatives
    said = _lines_by_iteration(
        axes, record, curves, "No pairing line is in metrics.jsonl, so nobody has won yet."
    )
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1.0)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("share of pairs")
    return said


def _agents(axes: Axes, record: RunRecord, summary: Summary) -> str:
    # With one agent the newest iterate draws everything: its curve is that of all images.
    one = "main" if summary.method.is_rollout else "exploration"
    curves = [(f"rollout/agent/{one}/reward", "collected images", BLUE, "o")]
    if summary.method.has_agents:
        curves = [
            ("rollout/agent/main/reward", "main agent", GREY, "s"),
            ("rollout/agent/exploration/reward", "exploration agent", BLUE, "o"),
        ]
    said = _lines_by_iteration(axes, record, curves, "Rewards of collected images are not in metrics.jsonl.")
    axes.set_ylabel("mean reward of collected images")
    return said


def _kept(axes: Axes, record: RunRecord, summary: Summary) -> str:
    rows = [row for row in pairing_rows(record.metrics) if row["count"] is not None]
    if not rows:
        raise Absent("No pairing line is in metrics.jsonl, so no pair was kept or dropped yet.")
    x, below = np.arange(len(rows)), np.zeros(len(rows))
    kinds = (
        ("count", "kept", BLUE, ""),
        ("dropped_ties", "dropped: tie", ORANGE, "//"),
        ("dropped_nan", "dropped: no score", RED, "xx"),
    )
    for name, label, colour, hatch in kinds:
        values = np.array([float(row[name] or 0) for row in rows])
        axes.bar(
            x,
            values,
            bottom=below,
            color=colour,
            width=0.6,
            hatch=hatch,
            edgecolor=LINE,
            linewidth=0,
            label=label,
        )
        below += values
    axes.set_xticks(x, [str(row["iteration"]) for row in rows])
    axes.set_ylim(0, below.max() * 1.35)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("collecting iteration")
    axes.set_ylabel("prompts")
    axes.legend(ncols=3, loc="upper center", columnspacing=1.0, handlelength=1.2)
    return "Pairs kept: " + ", ".join(str(row["count"]) for row in rows)


FIGURES: dict[str, Callable[[Axes, RunRecord, Summary], str]] = {
    "win_rate": _win_rate,
    "heldout": _heldout,
    "train_reward": _train_reward,
    "frontier": _frontier,
    "vendi": _vendi,
    "loss": _loss,
    "accuracy": _accuracy,
    "errors": _errors,
    "clipping": _clipping,
    "tau": _tau,
    "who_won": _who_won,
    "agents": _agents,
    "kept": _kept,
}
# Figures of optimiser steps: a method that does not record the metric does not have the figure.
METRICS = {
    "loss": "train/loss",
    "accuracy": "train/implicit_accuracy",
    "errors": "train/winner_reference_error",
    "clipping": "train/clip_fraction",
}
