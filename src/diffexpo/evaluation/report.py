"""report.html: one self-contained page that says whether the model got better, made from a run's files alone.

`page.py` makes everything on the page but its figures, and `figures.py` what all figures share. A figure that
the run's method does not have is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diffexpo.evaluation.figures import (
    BLUE,
    CARD,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    RED,
    TEXT,
    Absent,
    draw_figure,
    spread_of,
)
from diffexpo.evaluation.headline import FILE, headline
from diffexpo.evaluation.page import page_values, pairing_rows
from diffexpo.evaluation.records import RunRecord, load_run, series
from diffexpo.evaluation.summary import BASELINE, Estimate, Summary, summarise
from diffexpo.evaluation.templates import HERE, percent, template
from diffexpo.evaluation.wording import Method
from diffexpo.files import write_checksums, write_json, write_text

MAX_POINTS = 120
# Figures of optimiser steps: a method that does not record the metric does not have the figure.
METRICS = {
    "loss": "train/loss",
    "accuracy": "train/implicit_accuracy",
    "errors": "train/winner_reference_error",
    "clipping": "train/clip_fraction",
}

SEALED = (
    "report.html", "summary.json", "contenders.json", "config.source.yaml", "eval/*/suite.json",
    "eval/pairs/*", "eval/grid.png", "contenders/eval/*/suite.json",
)  # fmt: skip
"""What a report was made from and what it wrote, as SHA256SUMS of the run has it: everything but the store,
the weights and the metrics, which have checksums of their own."""


def write_report(run_dir: Path, state: str | None = None) -> Path:
    """Write `<run>/report.html` of a run, finished or not, the before/after sheet `<run>/eval/grid.png`, its
    headline numbers as `<run>/summary.json`, the table of contenders, if any, as `<run>/contenders.json`, and
    the checksums of these and of the evaluations as `<run>/SHA256SUMS`.

    `state` is the run's, where status.json does not have it yet. Returns the page's path; the same files give
    the same bytes. MissingError if the folder is not a run, DataError if one of its files is damaged.
    """
    record = load_run(Path(run_dir))
    if state is not None:
        record.status = {**record.status, "state": state}
    summary, path = summarise(record), record.run_dir / "report.html"
    has = {name: figure for name, figure in FIGURES.items() if _has(name, record, summary.method)}
    page = template("report.html.j2").render(
        page_values(record, summary),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "report.js").read_text(encoding="utf-8")),
        figures={name: _draw(name, figure, record, summary) for name, figure in has.items()},
    )
    write_text(path, page)
    write_json(record.run_dir / FILE, headline(record, summary))
    if summary.contenders is not None:
        named = {"name": record.config.get("name", ""), "seed": record.config.get("seed", 0)}
        write_json(record.run_dir / "contenders.json", named | summary.contenders.to_json())
    write_checksums(record.run_dir, [file for name in SEALED for file in record.run_dir.glob(name)])
    return path


def _has(name: str, record: RunRecord, method: Method) -> bool:
    """Whether a run of this method has the figure at all."""
    trained = [line for line in record.metrics if line.get("phase") == "train"]
    if name in METRICS and trained:
        return any(METRICS[name] in line for line in trained)
    ranked_pairs = method.collects and method.card.has_pairs and method.card.is_ranked
    return {
        "validation": bool(record.validations),
        "train_reward": method.has_rewards,
        "accuracy": method.card.has_pairs,
        "errors": method.card.has_pairs,
        "clipping": method.card.draws_first,
        "tau": method.has_negatives,
        "who_won": ranked_pairs and (method.has_agents or method.has_negatives),
        "agents": method.collects and method.has_rewards,
        "kept": ranked_pairs,
    }.get(name, True)


# ---- drawing ----------------------------------------------------------------------------------------------


def _draw(name: str, figure: Plot, record: RunRecord, summary: Summary) -> dict[str, Markup | str]:
    return draw_figure(name, lambda axes: figure(axes, record, summary))


def _iterations(axes: Axes, label: str = "iteration (0 = base)") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.08)
    left, right = axes.get_xlim()
    if right - left < 2:  # a single iterate: no ticks at fractions of an iteration
        axes.set_xlim(round((left + right) / 2) - 1.5, round((left + right) / 2) + 1.5)


def _by_iteration(values: dict[str, Estimate]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Iterations in order without the baseline, with their means, lower and upper ends."""
    numbers = {0 if name == "base" else int(name.split("-")[1]): name for name in values if name != BASELINE}
    x = sorted(numbers)
    mean, low, high = (np.array([values[numbers[number]][k] for number in x]) for k in range(3))
    return x, mean, low, high


def _baseline_mark(axes: Axes, values: dict[str, Estimate], x: Sequence[int]) -> None:
    """Offline DPO next to the last iterate."""
    if BASELINE in values:
        at, mean, spread = (x[-1] if x else 0) + 0.15, values[BASELINE][0], spread_of(values[BASELINE])
        axes.errorbar([at], [mean], yerr=spread, label="offline DPO", color=RED, marker="D", capsize=3)


# ---- evaluated versions -----------------------------------------------------------------------------------


def _reward(axes: Axes, summary: Summary, scorer: str | None, colour: str, marker: str, kind: str) -> str:
    if scorer is None:
        raise Absent(f"No {kind} was scored in the evaluation, so there is no reward curve for it.")
    if not summary.rewards.get(scorer):
        raise Absent(f"{scorer} has no finite score in any evaluation, so there is no curve.")
    if "base" not in summary.rewards[scorer]:
        raise Absent(f"The base model has no {scorer}, so there is nothing to compare with.")
    x, mean, low, high = _by_iteration(summary.gains[scorer])
    axes.axhline(0.0, color=GREY, linestyle="--", linewidth=1.2, label="base")
    axes.errorbar(
        x, mean, [mean - low, high - mean], color=colour, marker=marker, capsize=3, label=summary.method.name
    )
    _baseline_mark(axes, summary.gains[scorer], x)
    _iterations(axes)
    axes.set_ylabel(f"gain in {scorer}")
    listed = "; ".join(f"{number}: {value:+.3g}" for number, value in zip(x, mean, strict=True))
    return f"Gain in {scorer} over the base by iteration: {listed}"


def _heldout(axes: Axes, record: RunRecord, summary: Summary) -> str:
    return _reward(axes, summary, summary.judge, BLUE, "o", "held-out judge")


def _validation(axes: Axes, record: RunRecord, summary: Summary) -> str:
    found = summary.validation
    if found is None:
        raise Absent("No iterate is validated yet.")
    x = list(found.scores)
    mean, low, high = (np.array([found.scores[number][k] for number in x]) for k in range(3))
    axes.errorbar(x, mean, yerr=[mean - low, high - mean], color=GREEN, marker="o", capsize=3)
    axes.axvline(found.kept, color=GREY, linestyle=":", linewidth=1.2, label=f"kept: {found.kept}")
    _iterations(axes, "iteration")
    axes.set_ylabel(f"mean {found.judge}")
    listed = "; ".join(f"{number}: {value:.3g}" for number, value in found.means.items())
    return f"{found.judge} on the validation prompts by iteration: {listed}; iteration {found.kept} is kept"


def _train_reward(axes: Axes, record: RunRecord, summary: Summary) -> str:
    return _reward(axes, summary, summary.train_reward, ORANGE, "s", "train reward")


def _win_rate(axes: Axes, record: RunRecord, summary: Summary) -> str:
    if not summary.wins:
        needed = "a held-out judge, the base model's evaluation and at least one iterate"
        raise Absent(f"No win rate: it needs {needed}.")
    estimates = {name: win.interval for name, win in summary.wins.items()}
    x, mean, low, high = _by_iteration(estimates)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2, label="no difference")
    if x:
        spread, name = [mean - low, high - mean], summary.method.name
        axes.errorbar(x, mean, yerr=spread, color=BLUE, marker="o", capsize=3, label=name)
    _baseline_mark(axes, estimates, x)
    _iterations(axes, "iteration")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_ylabel("win rate vs base")
    label = summary.method.label
    listed = "; ".join(f"{label(name)}: {percent(win.rate)}" for name, win in summary.wins.items())
    return f"Win rate against the base. {listed}. Ties: {[win.ties for win in summary.wins.values()]}."


def _frontier(axes: Axes, record: RunRecord, summary: Summary) -> str:
    rewards, label = summary.gains.get(summary.judge or "", {}), summary.method.label
    shared = [name for name in rewards if name in summary.kl]
    if not shared or "base" not in rewards:
        reason = "the KL was not measured (evaluation.kl_prompts is 0) or no judge scored the images"
        raise Absent(f"No reward-KL curve: {reason}.")
    kl = {"base": (0.0, 0.0, 0.0)} | {name: summary.kl[name] for name in shared if name != BASELINE}
    path = {name: estimate[0] for name, estimate in kl.items()}
    paper = {
        "facecolor": CARD,
        "edgecolor": "none",
        "pad": 0.8,
        "alpha": 0.8,
    }  # words over lines stay legible
    axes.plot(list(path.values()), [rewards[name][0] for name in path], color=BLUE, linewidth=1.2)
    for name, distance in (kl | {name: summary.kl[name] for name in shared}).items():
        colour, marker = (RED, "D") if name == BASELINE else (BLUE, "o")
        x, y, xerr, yerr = distance[0], rewards[name][0], spread_of(distance), spread_of(rewards[name])
        axes.errorbar([x], [y], yerr, xerr, color=colour, marker=marker, capsize=2, elinewidth=0.9)
        axes.annotate(
            label(name), (x, y), textcoords="offset points", xytext=(6, -12), fontsize=8, bbox=paper
        )
    axes.margins(x=0.14, y=0.12)
    axes.set(xlabel="KL to the base (nats per image)", ylabel=f"gain in {summary.judge}")
    return "Gain in the held-out reward against KL: " + "; ".join(
        f"{label(name)} at {distance:.3g} nats: {rewards[name][0]:+.3g}" for name, distance in path.items()
    )


def _vendi(axes: Axes, record: RunRecord, summary: Summary) -> str:
    label = summary.method.label
    if not summary.vendi:
        reason = "evaluation.vendi_prompts is 0, vendi_images is 1, or no embedder was given"
        raise Absent(f"No Vendi score: {reason}.")
    for index, (name, estimate) in enumerate(summary.vendi.items()):
        colour, spread = {"base": GREY, BASELINE: RED}.get(name, BLUE), spread_of(estimate)
        axes.bar(index, estimate[0], 0.6, yerr=spread, capsize=3, color=colour, ecolor=TEXT)
    limit = max(suite.vendi_images for suite in record.suites.values())
    axes.axhline(limit, color=TEXT, linestyle=":", linewidth=1.2)
    axes.text(-0.4, limit, f"maximum {limit}", va="bottom", fontsize=8)
    axes.set_ylim(1, limit * 1.12)
    axes.set_xticks(range(len(summary.vendi)), [label(name) for name in summary.vendi])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("Vendi score")
    return f"Vendi score of at most {limit}: " + "; ".join(
        f"{label(name)} {estimate[0]:.2f}" for name, estimate in summary.vendi.items()
    )


# ---- optimiser steps --------------------------------------------------------------------------------------


def _training(record: RunRecord, name: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Optimiser steps through the run and values as means of equal bins, and where iterations begin."""
    lines = [line for line in record.metrics if line.get("phase") == "train"]
    found = [(index, value) for index, line in enumerate(lines, start=1) for _, value in series([line], name)]
    if not found:
        raise Absent(f"No training step with {name} is in metrics.jsonl yet.")
    x, y = np.array(found).T
    starts = [i for i in range(1, len(lines)) if lines[i].get("iteration") != lines[i - 1].get("iteration")]
    edges = np.linspace(0, len(y), min(len(y), MAX_POINTS) + 1).astype(int)
    bins = [slice(a, b) for a, b in pairwise(edges)]
    return np.array([x[part].mean() for part in bins]), np.array([y[part].mean() for part in bins]), starts


Level = tuple[float, str, str, str]
"""A horizontal line: value, colour, dash, label."""


def _curve(axes: Axes, record: RunRecord, name: str, label: str, ylabel: str, *levels: Level) -> np.ndarray:
    """Draw one metric of the optimiser steps with horizontal lines; returns its values."""
    x, y, starts = _training(record, f"train/{name}")
    axes.plot(x, y, color=BLUE, linewidth=1.3, label=label)
    for value, colour, dash, meaning in levels:
        axes.axhline(value, color=colour, linestyle=dash, linewidth=1.2, label=meaning)
    _steps(axes, starts, ylabel)
    return y


def _steps(axes: Axes, starts: Sequence[int], ylabel: str) -> None:
    for start in starts:
        axes.axvline(start + 0.5, color=LINE, linewidth=1.2)
    axes.set(xlabel="optimiser step (vertical lines: new iteration)", ylabel=ylabel)


def _loss(axes: Axes, record: RunRecord, summary: Summary) -> str:
    start = summary.method.card.start_loss
    name = "ln 2" if start == math.log(2) else f"{start}"
    levels = [] if start is None else [(start, GREY, "--", f"{name} = {start:.3f}")]
    y = _curve(axes, record, "loss", "loss", "loss" if start is None else "preference loss", *levels)
    meaning = "" if start is None else f"; {name} is where policy and reference are equal"
    return f"Training loss from {y[0]:.3f} to {y[-1]:.3f}{meaning}."


def _accuracy(axes: Axes, record: RunRecord, summary: Summary) -> str:
    levels = (0.5, GREY, "--", "coin flip"), (0.9, RED, ":", "alarm level")
    y = _curve(axes, record, "implicit_accuracy", "implicit accuracy", "share ranked right", *levels)
    axes.set_ylim(min(0.4, y.min()), 1.0)
    return f"Implicit accuracy from {y[0]:.2f} to {y[-1]:.2f}; one half is a coin flip."


def _errors(axes: Axes, record: RunRecord, summary: Summary) -> str:
    said = []
    for side, colour, dash in (("winner", BLUE, "-"), ("loser", ORANGE, "--")):
        x, own, starts = _training(record, f"train/{side}_error")
        _, reference, _ = _training(record, f"train/{side}_reference_error")
        if len(own) != len(reference) or (reference <= 0).any():
            reason = "Policy and reference errors in metrics.jsonl do not belong to the same steps"
            raise Absent(f"{reason}, so no ratio is drawn.")
        change = 100 * (own / reference - 1)
        axes.plot(x, change, color=colour, linestyle=dash, linewidth=1.3, label=f"{side}s")
        said.append(f"{side} {change[-1]:+.1f}%")
    axes.axhline(0.0, color=GREY, linestyle="--", linewidth=1.0, label="reference")
    _steps(axes, starts, "error vs reference, %")
    return "Prediction error relative to the reference at the end: " + ", ".join(said)


def _clipping(axes: Axes, record: RunRecord, summary: Summary) -> str:
    y = _curve(axes, record, "clip_fraction", "beyond the clip range", "share of the batch")
    axes.set_ylim(-0.02, 1.02)
    return f"Share of ratios beyond the clip range from {y[0]:.2f} to {y[-1]:.2f}."


# ---- collecting iterations --------------------------------------------------------------------------------

Curve = tuple[str, str, str, str]
"""Metric, label, colour, marker."""


def _lines_by_iteration(
    axes: Axes, record: RunRecord, curves: Sequence[Curve], ylabel: str, absent: str, is_share: bool = False
) -> str:
    said = []
    for (name, label, colour, marker), dash in zip(curves, ("-", "--", "-.", ":"), strict=False):
        points = series(record.metrics, name)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, dash, color=colour, marker=marker, label=label)
            said.append(f"{label}: " + ", ".join(f"{value:.3g}" for value in y))
    if not said:
        raise Absent(absent)
    _iterations(axes, "collecting iteration")
    axes.set_ylabel(ylabel)
    if is_share:
        axes.set_ylim(-0.05, 1.05)
    return "; ".join(said)


def _tau(axes: Axes, record: RunRecord, summary: Summary) -> str:
    curves = (
        ("explore/tau", "tau (planned)", BLUE, "o"),
        ("rollout/negative_prompt_fraction", "images with a negative prompt", ORANGE, "s"),
    )
    absent = "No collecting iteration is in metrics.jsonl, so nothing explored yet."
    return _lines_by_iteration(axes, record, curves, "share", absent, is_share=True)


def _who_won(axes: Axes, record: RunRecord, summary: Summary) -> str:
    agents = [
        ("pairs/winner_from_exploration", "winners: exploration agent", BLUE, "o"),
        ("pairs/loser_from_exploration", "losers: exploration agent", ORANGE, "s"),
    ]
    negatives = [("pairs/winner_from_negative", "winners: with negative prompt", GREEN, "^")]
    curves = agents * summary.method.has_agents + negatives * summary.method.has_negatives
    absent = "No pairing line is in metrics.jsonl, so nobody has won yet."
    said = _lines_by_iteration(axes, record, curves, "share of pairs", absent, is_share=True)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1.0)
    return said


def _agents(axes: Axes, record: RunRecord, summary: Summary) -> str:
    # One agent draws everything, the newest iterate or the base: its curve is that of all images.
    card = summary.method.card
    one = "base" if card.drawn_by == "base" else "main" if card.draws_first else "exploration"
    curves = [(f"rollout/agent/{one}/reward", "collected images", BLUE, "o")]
    if summary.method.has_agents:
        curves = [
            ("rollout/agent/main/reward", "main agent", GREY, "s"),
            ("rollout/agent/exploration/reward", "exploration agent", BLUE, "o"),
        ]
    absent = "Rewards of collected images are not in metrics.jsonl."
    return _lines_by_iteration(axes, record, curves, "mean reward of collected images", absent)


def _kept(axes: Axes, record: RunRecord, summary: Summary) -> str:
    rows = [row for row in pairing_rows(record.metrics) if row["count"] is not None]
    if not rows:
        raise Absent("No pairing line is in metrics.jsonl, so no pair was kept or dropped yet.")
    x, below = np.arange(len(rows)), np.zeros(len(rows))
    kept, ties = ("count", "kept", BLUE, ""), ("dropped_ties", "dropped: tie", ORANGE, "//")
    failed = ("dropped_nan", "dropped: no score", RED, "xx")
    for name, label, colour, hatch in (kept, ties, failed):
        values = np.array([float(row[name] or 0) for row in rows])
        axes.bar(x, values, 0.6, below, label=label, color=colour, hatch=hatch, edgecolor=LINE, linewidth=0)
        below += values
    axes.set_xticks(x, [str(row["iteration"]) for row in rows])
    axes.set_ylim(0, below.max() * 1.1)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="collecting iteration", ylabel="prompts")
    return "Pairs kept: " + ", ".join(str(row["count"]) for row in rows)


Plot = Callable[[Axes, RunRecord, Summary], str]
"""Draws on axes and says in words what it drew."""
FIGURES: dict[str, Plot] = {
    plot.__name__.removeprefix("_"): plot
    for plot in (
        *(_win_rate, _heldout, _validation, _train_reward, _frontier, _vendi),
        *(_loss, _accuracy, _errors, _clipping),
        *(_tau, _who_won, _agents, _kept),
    )
}
