"""The numbers behind the report: comparisons, history and cost of a run, computed from its files alone."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffexpo.config import RunConfig
from diffexpo.config.contenders import START
from diffexpo.config.rules import guidance_notes
from diffexpo.errors import DataError, DiffexpoError
from diffexpo.evaluation.alarms import (
    Alarm,
    History,
    Snapshot,
    check_alarms,
    early_alarms,
    looked_for,
    sound_before,
    start_error,
)
from diffexpo.evaluation.changes import gains_on_earlier, interval_notes, paired_change
from diffexpo.evaluation.contenders import Contenders, Entry, compare_contenders, guidance_title
from diffexpo.evaluation.metrics import WinRate, bootstrap_mean, win_rate
from diffexpo.evaluation.records import Json, RunRecord, SuiteResult, iteration_of, series
from diffexpo.evaluation.shares import ShareRow, share_judge, share_rows
from diffexpo.evaluation.validation import Validation, read_validation
from diffexpo.evaluation.wording import BASELINE, Method, describe_method
from diffexpo.online.cost import BACKWARD, sampling_cost, training_cost
from diffexpo.online.keeping import STAGE as VALIDATE

Estimate = tuple[float, float, float]

EQUAL_COST = 0.02
TAIL = 0.1
# Metrics of training steps whose means at the end of an iteration the alarms look at.
ERRORS = (
    *("winner_error", "loser_error", "winner_reference_error", "loser_reference_error"),
    "anchor_error",
)
CONFLICT = "rollout/conflict/"
IMPROVED = ("images", "relative_distance", "feature_cosine", "feature_cosine_unrelated")


@dataclass(frozen=True)
class CostRow:
    """What one phase spent, a backward pass counting as two evaluations; None where nothing was recorded."""

    phase: str
    evaluations: float | None = None
    images: float | None = None
    seconds: float | None = None
    peak_gib: float | None = None


@dataclass
class Summary:
    """Comparisons by version. The first held-out judge decides; intervals are 95% bootstrap over prompts.
    `rewards` are means by scorer, `gains` what they are above the base's on the same images, paired.

    `final` is the run's result, as far as it came: the last iterate, or the one that validation chose.
    """

    method: Method
    judge: str | None
    train_reward: str | None
    final: str | None
    planned_iterations: int | None
    wins: dict[str, WinRate] = field(default_factory=dict)
    against_baseline: WinRate | None = None
    rewards: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    gains: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    kl: dict[str, Estimate] = field(default_factory=dict)
    vendi: dict[str, Estimate] = field(default_factory=dict)
    vendi_change: Estimate | None = None
    alarms: list[Alarm] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    costs: list[CostRow] = field(default_factory=list)
    method_cost: float | None = None
    baseline_cost: float | None = None
    problems: list[str] = field(default_factory=list)
    conflicts: list[Json] = field(default_factory=list)
    improvements: list[Json] = field(default_factory=list)
    validation: Validation | None = None
    share_judge: str | None = None
    shares: list[ShareRow] = field(default_factory=list)
    contenders: Contenders | None = None
    evaluated: tuple[str, ...] = ()

    @property
    def compares_offline(self) -> bool:
        """Whether offline DPO was evaluated with the run, was planned, or is the natural comparison."""
        return BASELINE in self.evaluated or self.method.compares_offline

    @property
    def is_finished(self) -> bool:
        """Whether the result is evaluated, and no further iterate will come."""
        result = self.planned_iterations if self.validation is None else self.validation.kept
        is_over = self.validation is None or self.validation.is_over
        return is_over and self.final == f"iteration-{result}"

    @property
    def result(self) -> str:
        """What `final` is, in words."""
        return "the last iterate" if self.validation is None else "the iterate that was kept"


def summarise(record: RunRecord, version: str | None = None) -> Summary:
    """Everything the report states in numbers, from a run's files, complete or not. What cannot be computed
    is None or missing, with a sentence in `problems` where a file is at fault. `version` is the iterate that
    it is about, if not the run's result and if it was evaluated."""
    suites, iterations = record.suites, record.iterations
    roles = next(iter(suites.values())).roles if suites else {}
    summary = Summary(
        method=describe_method(record.config),
        evaluated=tuple(suites),
        judge=next((name for name, role in roles.items() if role == "heldout"), None),
        train_reward=next((name for name, role in roles.items() if role == "train"), None),
        final=f"iteration-{iterations[-1]}" if iterations else None,
        planned_iterations=record.config.get("explore", {}).get("iterations"),
        problems=list(record.problems),
    )
    resamples = int(record.config.get("evaluation", {}).get("bootstrap", 10000))
    bootstrap: Json = {"resamples": resamples, "seed": int(record.config.get("seed", 0))}
    if suites:
        summary.problems += interval_notes(resamples, suites.values())
    summary.validation = read_validation(record, **bootstrap)
    if summary.validation is not None and summary.validation.kept in iterations:
        summary.final = f"iteration-{summary.validation.kept}"
    if version in suites:
        summary.final = version
    for name, suite in suites.items():
        _measure(summary, name, suite, bootstrap)
    for name, suite in suites.items():
        if "base" in suites:
            _add_gains(summary, name, suites["base"], suite, bootstrap)
        if name != "base" and (outcome := _compare(summary, suites, name, "base", bootstrap)) is not None:
            summary.wins[name] = outcome
    if summary.final is not None:
        summary.against_baseline = _compare(summary, suites, summary.final, BASELINE, bootstrap)
        _count_shares(summary, record, bootstrap)
        if "base" in suites:
            base, last = suites["base"].vendi, suites[summary.final].vendi
            changes = [last[name] - base[name] for name in base if name in last]
            summary.vendi_change = bootstrap_mean(changes, **bootstrap) if changes else None
    method, numbers = summary.method, {0, *map(iteration_of, record.metrics), *iterations}
    snapshots = tuple(
        replace(_snapshot(record, summary, number), **changes_of(summary, record, number, bootstrap))
        for number in sorted(numbers)
    )
    history = History(
        snapshots,
        restraint=method.card.restraint,
        has_offline=method.has_offline,
        kept=_kept(summary, version if version in suites else None),
        run=shlex.quote(str(record.run_dir)),
    )
    found = looked_for(history)
    summary.checked = [what for what, is_known in found.items() if is_known]
    summary.unchecked = [what for what, is_known in found.items() if not is_known]
    summary.alarms = [*check_alarms(history), *guidance_alarms(record.config)]
    everything = {**suites, **{name: beside.suite for name, beside in record.contenders.items()}}
    summary.costs = cost_rows(record.metrics, record.config, everything)
    summary.method_cost = cost_of_method(summary.costs)
    summary.conflicts = conflict_rows(record.metrics)
    summary.improvements = improvement_rows(record.metrics)
    if record.baseline_metrics:
        summary.baseline_cost = cost_of_method(cost_rows(record.baseline_metrics, record.config, {}))
    summary.contenders = _contenders(summary, record, bootstrap)
    return summary


def _contenders(summary: Summary, record: RunRecord, bootstrap: Json) -> Contenders | None:
    """The run beside everything that it is compared with, under the judge that decides."""
    method, final, judge = summary.method, summary.final, summary.share_judge or summary.judge
    if final is None or judge is None or "base" not in record.suites:
        return None
    entries = [Entry("base", guidance_title(record.suites["base"]), record.suites["base"], 0.0, is_base=True)]
    start, spent = str(record.config.get("tuning", {}).get("start") or ""), 0.0
    for name, beside in record.contenders.items():
        if beside.config:
            cost = cost_of_method(cost_rows(beside.metrics, beside.config, {}))
            title = f"{describe_method(beside.config).name} ({name})"
            if start == START + name:
                title, spent = f"{title}, where training starts", cost or 0.0
            entries.append(Entry(name, title, beside.suite, cost))
        else:
            entries.append(Entry(name, guidance_title(beside.suite), beside.suite, 0.0, is_base=True))

    def plus(cost: float | None) -> float | None:
        return None if cost is None else spent + cost

    if BASELINE in record.suites:
        entries.append(
            Entry(BASELINE, method.label(BASELINE), record.suites[BASELINE], plus(summary.baseline_cost))
        )
    entries.sort(key=lambda entry: not entry.is_base)
    run = Entry(final, method.label(final), record.suites[final], plus(summary.method_cost))
    is_share = summary.share_judge is not None
    return compare_contenders([*entries, run], judge, is_share=is_share, **bootstrap)


def cost_rows(metrics: Sequence[Json], config: Json, suites: dict[str, SuiteResult]) -> list[CostRow]:
    """Recorded cost by phase; evaluations that were not recorded follow from what was done."""
    rows = []
    for phase in ("improver", "collect", "improve", "pair", "train", VALIDATE, "evaluate"):
        names = (phase, "train_summary") if phase == "train" else (phase,)
        lines = [line for line in metrics if line.get("phase") in names]
        peak = max(_values(lines, "mem/peak_gib"), default=None)
        if phase == "evaluate" and suites:
            done = suites.values()
            evaluations: float | None = sum(suite.network_evaluations for suite in done)
            images: float | None = sum(len(suite.images) for suite in done)
            rows.append(CostRow(phase, evaluations, images, sum(suite.seconds for suite in done), peak))
        elif lines:
            images, evaluations = _total(lines, "rollout/images"), _total(lines, "cost/network_evaluations")
            if evaluations is None:
                evaluations = _derived_cost(phase, lines, images, config)
            else:
                evaluations += BACKWARD * (_total(lines, "cost/backward_evaluations") or 0.0)
            rows.append(CostRow(phase, evaluations, images, _total(lines, f"time/{phase}_s"), peak))
    return rows


def _derived_cost(phase: str, lines: Sequence[Json], images: float | None, config: Json) -> float | None:
    """Evaluations of the collected images, or of the optimiser steps of a loss on pairs of images."""
    settings = _settings(config)
    if settings is None:
        return None
    if phase == "collect" and images is not None:
        return sampling_cost(settings, int(images))
    method = describe_method(config)
    steps = Counter(iteration_of(line) for line in lines if line.get("phase") == "train")
    if phase != "train" or not steps or not method.card.has_pairs or method.card.draws_first:
        return None
    done = sum(count * training_cost(settings, iteration) for iteration, count in steps.items())
    return done / settings.training.steps


def _settings(config: Json) -> RunConfig | None:
    """A run's settings; None for those of another version of this package."""
    try:
        return RunConfig.model_validate(config)
    except (ValueError, DiffexpoError):
        return None


def guidance_alarms(config: Json) -> Iterator[Alarm]:
    """A note on each setting of guidance that does not go together with the others."""
    settings = _settings(config)
    for note in guidance_notes(settings) if settings is not None else ():
        advice = "Choose settings that go together, and run again."
        yield Alarm("guidance", "note", f"guidance is set inconsistently: {note}.", advice)


def conflict_rows(metrics: Sequence[Json]) -> list[Json]:
    """How two scorers order a prompt's images, see `rewards.mixture.conflict_metrics`: one row for each
    collection and couple of scorers. Measures are None where nothing was decided."""
    rows = []
    for line in metrics:
        for couple in sorted({name.rpartition("/")[0] for name in line if name.startswith(CONFLICT)}):
            first, _, second = couple.removeprefix(CONFLICT).partition(":")
            row: Json = {"iteration": iteration_of(line), "first": first, "second": second}
            measures = ("rank_correlation", "disagreement")
            rows.append(row | {what: _first([line], f"{couple}/{what}") for what in measures})
    return rows


def improvement_rows(metrics: Sequence[Json]) -> list[Json]:
    """What an improvement model made of an iteration's images, one row an iteration; None: not measured."""
    rows = []
    for line in (line for line in metrics if line.get("phase") == "improve"):
        gains = {
            name.removeprefix("improve/reward/").removesuffix("/gain"): float(value)
            for name, value in line.items()
            if name.startswith("improve/reward/") and name.endswith("/gain") and value is not None
        }
        measured = {name: _first([line], f"improve/{name}") for name in IMPROVED}
        rows.append({"iteration": iteration_of(line), "gains": gains} | measured)
    return rows


def tail_mean(lines: Sequence[Json], name: str, iteration: int) -> float | None:
    """Mean of a training metric over the last tenth (at least 5) of an iteration's steps."""
    values = [value for number, value in series(lines, name, "train") if number == iteration]
    return float(np.mean(values[-max(5, math.ceil(len(values) * TAIL)) :])) if values else None


def _measure(summary: Summary, name: str, suite: SuiteResult, bootstrap: Json) -> None:
    ids = list(np.array(suite.prompt_ids())[suite.scored])
    for scorer, values in suite.scores.items():
        mine = values[suite.scored]
        if np.isfinite(mine).any():
            summary.rewards.setdefault(scorer, {})[name] = bootstrap_mean(mine, ids, **bootstrap)
        if failed := int((~np.isfinite(mine)).sum()):
            counts = f"{failed} of {len(mine)} images"
            summary.problems.append(f"{name}: {scorer} could not score {counts}; they are left out.")
    if len(suite.kl) and np.isfinite(suite.kl).any():
        summary.kl[name] = bootstrap_mean(suite.kl, **bootstrap)
    if suite.vendi:
        summary.vendi[name] = bootstrap_mean(list(suite.vendi.values()), **bootstrap)


def _add_gains(summary: Summary, name: str, base: SuiteResult, suite: SuiteResult, bootstrap: Json) -> None:
    for scorer in suite.scores:
        gain = paired_change(base, suite, scorer, bootstrap)
        if gain is not None:
            summary.gains.setdefault(scorer, {})[name] = gain


def _count_shares(summary: Summary, record: RunRecord, bootstrap: Json) -> None:
    """Shares of right images, where a judge tells right from wrong and the versions drew the same images."""
    suites, final = record.suites, summary.final or ""
    judge = share_judge(record.config, suites[final].roles)
    rows = _rows_of(suites[final])
    same = {name: suite for name, suite in suites.items() if _rows_of(suite) == rows}
    if judge is not None and "base" in same:
        summary.share_judge = judge
        summary.shares = share_rows(same, judge, final, **bootstrap)


def _rows_of(suite: SuiteResult) -> tuple[list[str], list[int]]:
    return suite.prompt_ids(), suite.image_index.tolist()


def _compare(
    summary: Summary, suites: Mapping[str, SuiteResult], name: str, other: str, bootstrap: Json
) -> WinRate | None:
    """Win rate on the rows that both versions hold (same prompt, same image index, hence same noise)."""
    if other not in suites or summary.judge is None:
        return None
    left, right = (suites[version].by_image(summary.judge) for version in (name, other))
    shared = [key for key in left if key in right]
    if len(shared) < (most := max(len(left), len(right))):
        counts = f"{name} and {other} share {len(shared)} of {most} images"
        summary.problems.append(f"{counts}; only those are compared.")
    scores = ([side[key] for key in shared] for side in (left, right))
    try:
        return win_rate(*scores, prompts=[prompt for prompt, _ in shared], **bootstrap)
    except DataError as error:
        summary.problems.append(f"{name} cannot be compared with {other}: {error}")
        return None


def _snapshot(record: RunRecord, summary: Summary, number: int) -> Snapshot:
    """What the alarms look at of one iteration (0: base)."""
    name = "base" if number == 0 else f"iteration-{number}"
    wins = summary.wins.get(name)
    lines = [line for line in record.metrics if iteration_of(line) == number]
    rewards = record.config.get("rewards", [])
    ranked = [reward["name"] for reward in rewards if reward.get("role", "train") == "train"]
    stds, failed = (
        [value for name in ranked for _, value in series(lines, f"rollout/reward/{name}/{what}", "collect")]
        for what in ("std", "failed")
    )
    return replace(
        training_snapshot(lines, number),
        train_reward=summary.rewards.get(summary.train_reward or "", {}).get(name),
        heldout_reward=summary.rewards.get(summary.judge or "", {}).get(name),
        validation=None if summary.validation is None else summary.validation.means.get(number),
        win_rate=wins.interval if wins else None,
        vendi=summary.vendi[name][0] if name in summary.vendi else None,
        kl=summary.kl[name][0] if name in summary.kl else None,
        reward_std=max(stds, default=None),
        images=_last(lines, "rollout/images"),
        images_failed=int(max(failed)) if failed else None,
        groups=_last(lines, "pairs/groups"),
        dropped_ties=_last(lines, "pairs/dropped_ties"),
        improved_distance=_first(lines, "improve/relative_distance"),
    )


def _kept(summary: Summary, version: str | None) -> int | None:
    """The iterate that a summary is about, where it is not the last one: that of a version, such as
    "iteration-2", or the one that validation chose."""
    if version is not None:
        return int(version.rpartition("-")[2])
    return None if summary.validation is None else summary.validation.kept


def changes_of(summary: Summary, record: RunRecord, number: int, bootstrap: Json) -> Json:
    """What the run's result gained on the base and on earlier iterates; nothing for other iterates."""
    if f"iteration-{number}" != summary.final:
        return {}
    suites = record.suites
    return {
        "heldout_changes": gains_on_earlier(suites, number, summary.judge, bootstrap),
        "train_change": gains_on_earlier(suites, number, summary.train_reward, bootstrap).get(0),
    }


def alarms_of_training(metrics: Sequence[Json], iteration: int, run: str = "RUN") -> list[Alarm]:
    """What the training of an iteration tells of its iterate before it draws an image; `run` is how commands
    name the run."""
    trained = [training_snapshot(metrics, number) for number in range(1, iteration + 1)]
    start = start_error(trained)
    return early_alarms(trained[-1], start, run, sound_before(trained, iteration, start))


def training_snapshot(lines: Sequence[Json], number: int) -> Snapshot:
    """What the metrics of an iteration's training alone say of it."""

    def mean(name: str) -> float | None:
        found = [value for iteration, value in series(lines, f"train/{name}", "train") if iteration == number]
        return float(np.mean(found)) if found else None

    tails: Json = {key: tail_mean(lines, f"train/{key}", number) for key in ("implicit_accuracy", *ERRORS)}
    return Snapshot(
        iteration=number,
        skipped_steps=_last([line for line in lines if iteration_of(line) == number], "train/skipped_steps"),
        common_part=mean("common_part"),
        norm_ratio=mean("prediction_norm_ratio"),
        anchor_norm_ratio=mean("anchor_norm_ratio"),
        **tails,
    )


def _values(lines: Sequence[Json], name: str) -> list[float]:
    return [value for _, value in series(lines, name)]


def _first(lines: Sequence[Json], name: str) -> float | None:
    return next(iter(_values(lines, name)), None)


def _last(lines: Sequence[Json], name: str) -> int | None:
    found = _values(lines, name)
    return int(found[-1]) if found else None


def _total(lines: Sequence[Json], name: str) -> float | None:
    found = _values(lines, name)
    return sum(found) if found else None


def cost_of_method(rows: Sequence[CostRow]) -> float | None:
    """Evaluations of collecting and training, without evaluating; None where one of them is not known."""
    spent = [row.evaluations for row in rows if row.phase in ("collect", "train")]
    known = [evaluations for evaluations in spent if evaluations is not None]
    return sum(known) if known and len(known) == len(spent) else None
