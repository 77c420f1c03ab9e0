"""The numbers behind the report: comparisons, history and cost of a run, computed from its files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diffexpo.config.methods.data import Pairs
from diffexpo.config.schema import SamplerConfig, TrainingConfig
from diffexpo.diffusion import num_network_evaluations
from diffexpo.errors import DataError
from diffexpo.evaluation.alarms import Alarm, History, Snapshot, check_alarms
from diffexpo.evaluation.metrics import WinRate, bootstrap_mean, win_rate
from diffexpo.evaluation.records import Json, RunRecord, SuiteResult, series
from diffexpo.evaluation.wording import BASELINE, Method, card_of, describe_method
from diffexpo.online.cost import BACKWARD, evaluations_of_row

Estimate = tuple[float, float, float]
EQUAL_COST = 0.02
TAIL = 0.1


@dataclass(frozen=True)
class CostRow:
    """What one phase spent; None where nothing was recorded."""

    phase: str
    forwards: float | None = None
    backwards: float | None = None
    images: float | None = None
    seconds: float | None = None
    peak_gib: float | None = None

    @property
    def total(self) -> float:
        """Network evaluations, a backward pass counting two."""
        return (self.forwards or 0.0) + BACKWARD * (self.backwards or 0.0)


@dataclass(frozen=True)
class Conflict:
    """How two scorers order the images of a prompt in one collection; see `rewards.mixture.conflict_metrics`.

    `rank_correlation` in [-1, 1], `disagreement` the share of couples ordered oppositely; None where nothing
    was decided.
    """

    iteration: int
    first: str
    second: str
    rank_correlation: float | None
    disagreement: float | None


@dataclass(frozen=True)
class Improvement:
    """What an improvement model made of an iteration's images: see the metrics `improve/*`; None where not
    measured."""

    iteration: int
    images: float | None
    relative_distance: float | None
    feature_cosine: float | None
    feature_cosine_unrelated: float | None
    gains: dict[str, float]


@dataclass
class Summary:
    """Comparisons by version. The first held-out judge decides; intervals are 95% bootstrap over prompts."""

    method: Method
    judge: str | None
    train_reward: str | None
    final: str | None
    planned_iterations: int | None
    wins: dict[str, WinRate] = field(default_factory=dict)
    against_baseline: WinRate | None = None
    rewards: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    kl: dict[str, Estimate] = field(default_factory=dict)
    vendi: dict[str, Estimate] = field(default_factory=dict)
    vendi_change: Estimate | None = None
    history: History = field(default_factory=History)
    alarms: list[Alarm] = field(default_factory=list)
    costs: list[CostRow] = field(default_factory=list)
    method_cost: float | None = None
    baseline_cost: float | None = None
    problems: list[str] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    improvements: list[Improvement] = field(default_factory=list)
    evaluated: tuple[str, ...] = ()

    @property
    def compares_offline(self) -> bool:
        """Whether offline DPO was evaluated beside the run, was planned, or is the natural question."""
        return BASELINE in self.evaluated or self.method.compares_offline

    @property
    def is_finished(self) -> bool:
        """Whether the last planned iteration was evaluated."""
        return self.final is not None and self.final == f"iteration-{self.planned_iterations}"


def summarise(record: RunRecord) -> Summary:
    """Everything the report states in numbers.

    Args:
        record: The run's files, complete or not.
    Returns:
        A Summary; what cannot be computed is None or missing, with a sentence in `problems` where a file is
        at fault.
    """
    suites, iterations = record.suites, record.iterations
    roles = next(iter(suites.values())).roles if suites else {}
    summary = Summary(
        method=describe_method(record.config),
        evaluated=tuple(suites),
        judge=next((name for name, role in roles.items() if role == "heldout"), None),
        train_reward=next((name for name, role in roles.items() if role == "train"), None),
        final=f"iteration-{iterations[-1]}" if iterations else None,
        planned_iterations=_planned(record.config),
        problems=list(record.problems),
    )
    resamples = int(_get(record.config, "evaluation", "bootstrap", default=10000))
    seed = int(record.config.get("seed", 0))
    for name, suite in suites.items():
        _measure(summary, name, suite, resamples, seed)
    base = suites.get("base")
    for name, suite in suites.items():
        if base is not None and name != "base" and summary.judge is not None:
            outcome = _compare(summary, name, suite, "base", base, resamples, seed)
            if outcome is not None:
                summary.wins[name] = outcome
    if summary.final is not None and BASELINE in suites and summary.judge is not None:
        summary.against_baseline = _compare(
            summary, summary.final, suites[summary.final], BASELINE, suites[BASELINE], resamples, seed
        )
    if base is not None and summary.final is not None:
        summary.vendi_change = _vendi_change(base, suites[summary.final], resamples, seed)
    summary.history = build_history(record, summary)
    summary.alarms = check_alarms(summary.history)
    summary.costs = cost_rows(record.metrics, record.config, suites)
    summary.method_cost = _method_cost(summary.costs)
    summary.conflicts = conflict_rows(record.metrics)
    summary.improvements = improvement_rows(record.metrics)
    if record.baseline_metrics:
        summary.baseline_cost = _method_cost(cost_rows(record.baseline_metrics, record.config, {}))
    return summary


def build_history(record: RunRecord, summary: Summary) -> History:
    """What the alarms look at, one snapshot an iteration (0: base)."""
    numbers = sorted(
        {0} | {int(line.get("iteration") or 0) for line in record.metrics} | set(record.iterations)
    )
    snapshots = tuple(_snapshot(record, summary, number) for number in numbers)
    return History(snapshots, restraint=summary.method.restraint, has_offline=summary.method.has_offline)


def cost_rows(metrics: Sequence[Json], config: Json, suites: dict[str, SuiteResult]) -> list[CostRow]:
    """Cost by phase: recorded `cost/*`, `time/*`, `mem/*` where they are, else evaluations derived from what
    was done.

    Derived: collected images times evaluations an image; for losses on pairs of images, optimiser steps times
    pairs times (4 forwards, 2 backwards).
    """
    rows = []
    for phase in ("improver", "collect", "improve", "pair", "train", "evaluate"):
        names = (phase, "train_summary") if phase == "train" else (phase,)
        lines = [line for line in metrics if line.get("phase") in names]
        if not lines and not (phase == "evaluate" and suites):
            continue
        forwards, backwards = (
            _total(lines, "cost/network_evaluations"),
            _total(lines, "cost/backward_evaluations"),
        )
        images = _total(lines, "rollout/images")
        if phase == "collect" and forwards is None and images is not None:
            sampler = SamplerConfig(**_get(config, "explore", "sampler", default={}))
            forwards = images * num_network_evaluations(sampler, sampler.guidance != 1.0)
        if phase == "train" and forwards is None:
            forwards, backwards = _training_cost(lines, config)
        if phase == "evaluate" and suites:
            forwards = sum(suite.network_evaluations for suite in suites.values())
            images = sum(len(suite.images) for suite in suites.values())
        seconds = _total(lines, f"time/{phase}_s")
        if phase == "evaluate" and suites:
            seconds = sum(suite.seconds for suite in suites.values())
        peaks = [value for _, value in series(lines, "mem/peak_gib")]
        rows.append(CostRow(phase, forwards, backwards, images, seconds, max(peaks) if peaks else None))
    return rows


CONFLICT = "rollout/conflict/"


def conflict_rows(metrics: Sequence[Json]) -> list[Conflict]:
    """One row for each collection and couple of scorers, in the order of the file; empty where one scorer
    ranks alone."""
    rows = []
    for line in metrics:
        couples = {
            name.removeprefix(CONFLICT).rpartition("/")[0] for name in line if name.startswith(CONFLICT)
        }
        for couple in sorted(couples):
            first, _, second = couple.partition(":")
            measured = [
                _number(line, f"{CONFLICT}{couple}/{what}") for what in ("rank_correlation", "disagreement")
            ]
            rows.append(Conflict(int(line.get("iteration") or 0), first, second, *measured))
    return rows


def improvement_rows(metrics: Sequence[Json]) -> list[Improvement]:
    """One row for each iteration whose images an improvement model redrew."""
    rows = []
    for line in (line for line in metrics if line.get("phase") == "improve"):
        gains = {
            name.removeprefix("improve/reward/").removesuffix("/gain"): float(value)
            for name, value in line.items()
            if name.startswith("improve/reward/") and name.endswith("/gain") and value is not None
        }
        names = ("images", "relative_distance", "feature_cosine", "feature_cosine_unrelated")
        measured = [_number(line, f"improve/{name}") for name in names]
        rows.append(Improvement(int(line.get("iteration") or 0), *measured, gains))
    return rows


def _number(line: Json, name: str) -> float | None:
    found = series([line], name)
    return found[0][1] if found else None


def tail_mean(lines: Sequence[Json], name: str, iteration: int) -> float | None:
    """Mean of a training metric over the last tenth (at least 5) of an iteration's steps."""
    values = [value for number, value in series(lines, name, "train") if number == iteration]
    return float(np.mean(values[-max(5, math.ceil(len(values) * TAIL)) :])) if values else None


def _planned(config: Json) -> int | None:
    value = _get(config, "explore", "iterations", default=None)
    return int(value) if value is not None else None


def _get(config: Json, *keys: str, default: object) -> object:
    value: object = config
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def _measure(summary: Summary, name: str, suite: SuiteResult, resamples: int, seed: int) -> None:
    ids = np.array(suite.prompt_ids())[suite.scored]
    for scorer, values in suite.scores.items():
        mine = values[suite.scored]
        if np.isfinite(mine).any():
            estimate = bootstrap_mean(mine, list(ids), resamples=resamples, seed=seed)
            summary.rewards.setdefault(scorer, {})[name] = estimate
        if not np.isfinite(mine).all():
            failed = int((~np.isfinite(mine)).sum())
            summary.problems.append(
                f"{name}: {scorer} could not score {failed} of {len(mine)} images; they are left out."
            )
    if len(suite.kl) and np.isfinite(suite.kl).any():
        summary.kl[name] = bootstrap_mean(suite.kl, resamples=resamples, seed=seed)
    if suite.vendi:
        summary.vendi[name] = bootstrap_mean(list(suite.vendi.values()), resamples=resamples, seed=seed)


def _compare(
    summary: Summary,
    name: str,
    suite: SuiteResult,
    other_name: str,
    other: SuiteResult,
    resamples: int,
    seed: int,
) -> WinRate | None:
    """Win rate on the rows that both hold (same prompt, same image index, hence same noise)."""
    left, right = _by_key(suite, summary.judge), _by_key(other, summary.judge)
    shared = [key for key in left if key in right]
    if len(shared) < max(len(left), len(right)):
        summary.problems.append(
            f"{name} and {other_name} share {len(shared)} of {max(len(left), len(right))} images; only those "
            f"are compared."
        )
    try:
        return win_rate(
            [left[key] for key in shared],
            [right[key] for key in shared],
            prompts=[key[0] for key in shared],
            resamples=resamples,
            seed=seed,
        )
    except DataError as error:
        summary.problems.append(f"{name} cannot be compared with {other_name}: {error}")
        return None


def _by_key(suite: SuiteResult, judge: str) -> dict[tuple[str, int], float]:
    if judge not in suite.scores:
        return {}
    ids = suite.prompt_ids()
    return {
        (ids[row], int(suite.image_index[row])): float(suite.scores[judge][row])
        for row in np.flatnonzero(suite.scored)
    }


def _vendi_change(base: SuiteResult, last: SuiteResult, resamples: int, seed: int) -> Estimate | None:
    shared = [name for name in base.vendi if name in last.vendi]
    if not shared:
        return None
    return bootstrap_mean(
        [last.vendi[name] - base.vendi[name] for name in shared], resamples=resamples, seed=seed
    )


def _snapshot(record: RunRecord, summary: Summary, number: int) -> Snapshot:
    name = "base" if number == 0 else f"iteration-{number}"
    wins = summary.wins.get(name)
    lines = [line for line in record.metrics if int(line.get("iteration") or 0) == number]
    ranked = [scorer for scorer in _train_names(record.config)]
    stds = [
        value for scorer in ranked for _, value in series(lines, f"rollout/reward/{scorer}/std", "collect")
    ]
    tails = {key: tail_mean(lines, f"train/{key}", number) for key in _TAILS}
    return Snapshot(
        iteration=number,
        train_reward=summary.rewards.get(summary.train_reward or "", {}).get(name),
        heldout_reward=summary.rewards.get(summary.judge or "", {}).get(name),
        win_rate=(wins.rate, wins.low, wins.high) if wins else None,
        vendi=summary.vendi[name][0] if name in summary.vendi else None,
        kl=summary.kl[name][0] if name in summary.kl else None,
        reward_std=max(stds) if stds else None,
        images=_last(lines, "rollout/images"),
        images_failed=_failed(lines, ranked),
        groups=_last(lines, "pairs/groups"),
        dropped_ties=_last(lines, "pairs/dropped_ties"),
        skipped_steps=_last(lines, "train/skipped_steps"),
        improved_distance=next((value for _, value in series(lines, "improve/relative_distance")), None),
        **tails,
    )


_TAILS = (
    "implicit_accuracy",
    "winner_error",
    "loser_error",
    "winner_reference_error",
    "loser_reference_error",
)


def _train_names(config: Json) -> list[str]:
    rewards = _get(config, "rewards", default=[])
    return [reward["name"] for reward in rewards if reward.get("role", "train") == "train"]


def _last(lines: Sequence[Json], name: str) -> int | None:
    found = series(lines, name)
    return int(found[-1][1]) if found else None


def _failed(lines: Sequence[Json], names: Sequence[str]) -> int | None:
    found = [
        value for name in names for _, value in series(lines, f"rollout/reward/{name}/failed", "collect")
    ]
    return int(max(found)) if found else None


def _total(lines: Sequence[Json], name: str) -> float | None:
    found = [value for _, value in series(lines, name)]
    return sum(found) if found else None


def _training_cost(lines: Sequence[Json], config: Json) -> tuple[float | None, float | None]:
    method = describe_method(config)
    if not method.has_pairs or method.is_rollout:
        return None, None
    batch = _get(config, "training", "batch_size", default=None)
    steps = [int(line.get("iteration") or 0) for line in lines if line.get("phase") == "train"]
    if batch is None or not steps:
        return None, None
    card, training = card_of(_get(config, "algorithm", default={})), _get(config, "training", default={})
    data, settings = card.data, TrainingConfig.model_construct(**training)
    extra = data.contrast_pairs(int(batch)) if isinstance(data, Pairs) else 0
    pairs = sum(int(batch) + (extra if iteration > 1 else 0) for iteration in steps)
    backwards = data.images_per_row
    forwards = evaluations_of_row(card, settings, is_guided=False) - BACKWARD * backwards
    return pairs * forwards, pairs * backwards


def _method_cost(rows: Sequence[CostRow]) -> float | None:
    """Evaluations of the method itself: collecting and training, without evaluation; None where one of them
    is not known."""
    spent = [row for row in rows if row.phase in ("collect", "train")]
    if not spent or any(row.forwards is None for row in spent):
        return None
    return sum(row.total for row in spent)
