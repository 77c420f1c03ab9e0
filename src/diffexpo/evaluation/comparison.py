"""Runs beside each other, from their files alone: how far each came over what it spent, seeds joined to means
with intervals, who beats whom, and what differs in their settings.

All scores are by (seed, prompt, image), which names an image's noise: runs are compared on the images that
they share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from diffexpo.evaluation.contenders import finite, guidance_title
from diffexpo.evaluation.planning import Spread, detectable_difference, measured_spread, num_prompts_needed
from diffexpo.evaluation.ranking import Ranking, duels_of_scores, rank
from diffexpo.evaluation.records import Json, SuiteResult
from diffexpo.evaluation.run_groups import (
    BASE,
    ReadRun,
    choose_judge,
    differing,
    grouped,
    labels_of,
    notes_on,
    read_runs,
)
from diffexpo.evaluation.spending import evaluations_until
from diffexpo.evaluation.statistics import (
    Comparison,
    Estimate,
    ImageKey,
    Scores,
    compare_models,
    frontier,
    mean_score,
)
from diffexpo.evaluation.wording import BASELINE

FORMAT = 1


@dataclass(frozen=True)
class Point:
    """An iterate (0: the base) of one run, or joined over the runs of a group that have it.

    `iteration` is None where the runs of a group have kept different ones. `gain` and `rate` are against the
    base on the same prompts and noise. Each estimate is a mean with its 95% interval, None where it was not
    measured; evaluations are those of the network until the iterate was there.
    """

    iteration: int | None
    seeds: int
    evaluations: float | None
    score: Estimate | None
    gain: Estimate | None
    rate: Estimate | None
    kl: Estimate | None
    vendi: Estimate | None


@dataclass(frozen=True)
class ComparedRun:
    """A run: `result` is the iterate that it ends with, as far as it came; `points` are its iterates."""

    name: str
    folder: str
    seed: int
    state: str
    result: int | None
    points: tuple[Point, ...]
    evaluations: float | None
    minutes: float | None
    peak_gib: float | None
    alarms: tuple[str, ...]

    @property
    def final(self) -> Point | None:
        """Its result among its iterates."""
        return next((point for point in self.points if point.iteration == self.result), None)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone: `result` joins their results, `points` their iterates."""

    label: str
    runs: tuple[ComparedRun, ...]
    result: Point | None
    points: tuple[Point, ...]

    @property
    def last(self) -> Point | None:
        """The last iterate."""
        return self.points[-1] if len(self.points) > 1 else None

    @property
    def best(self) -> Point | None:
        """The iterate with the highest mean score on these very prompts, which flatters it."""
        scored = [point for point in self.points[1:] if point.score is not None]
        return max(scored, key=lambda point: point.score[0] if point.score else -math.inf, default=None)


@dataclass(frozen=True)
class Power:
    """What the comparison of two models can see.

    `detectable` is the smallest difference that four of five comparisons with as many prompts find, `needed`
    the number of prompts that shows the one measured in as many (None: it is 0).
    """

    spread: Spread
    images: int
    num_prompts: int
    detectable: float
    needed: int | None

    def detectable_with(self, num_prompts: int) -> float:
        """The same for another number of prompts, with as many images each."""
        return detectable_difference(num_prompts, self.spread, images=self.images)


@dataclass(frozen=True)
class RunComparison:
    """Everything that the page of a comparison states.

    `contenders` has mean scores of what runs were compared with besides the base; where they have different
    bases, of those too. `power` is by couple, as
    `comparisons` are; `settings` are those that differ, by dotted path and group; `frontier` names (group,
    iteration).
    """

    judge: str
    about_judge: str
    is_share: bool
    groups: tuple[Group, ...]
    contenders: Mapping[str, Estimate]
    comparisons: tuple[Comparison, ...]
    power: tuple[Power | None, ...]
    ranking: Ranking | None
    frontier: tuple[tuple[str, int], ...]
    base: Point | None
    settings: Mapping[str, Mapping[str, object]]
    problems: tuple[str, ...]

    @property
    def runs(self) -> list[tuple[Group, ComparedRun]]:
        """Every run with its group, in order."""
        return [(group, run) for group in self.groups for run in group.runs]

    def to_json(self) -> Json:
        """The comparison as JSON values; `format` grows when a name changes its meaning."""
        found = {"format": FORMAT} | asdict(self)
        for group, kept in zip(found["groups"], self.groups, strict=True):
            for name in ("last", "best"):
                point = getattr(kept, name)
                group[name] = None if point is None else asdict(point)
        for row, one in zip(found["comparisons"], self.comparisons, strict=True):
            row["verdict"] = one.verdict
        plain: Json = finite(found)
        return plain


def compare_runs(folders: Sequence[Path], *, judge: str | None = None) -> RunComparison:
    """Compare runs, finished or not.

    Args:
        folders: Run folders, at least one.
        judge: Held-out judge that all of them were evaluated with; by default the first that they share, one
            that says right or wrong before others.
    Returns:
        A RunComparison; runs without an evaluation are in its tables without numbers.
    Raises:
        MissingError: a folder is no run.
        DataError: a file of a run is damaged.
        ConfigError: no judge is shared, or the one named is not, or it trained one of the runs.
    """
    found = read_runs([Path(folder) for folder in folders])
    evaluated = [run for run in found if BASE in run.record.suites]
    chosen = choose_judge(evaluated, judge)
    problems = notes_on(found, chosen)
    kept, repeated = grouped(found)
    labels = labels_of([runs[0] for runs in kept])
    resamples = int(found[0].record.config.get("evaluation", {}).get("bootstrap", 10000))
    groups = [_group(label, runs, chosen, resamples) for label, runs in zip(labels, kept, strict=True)]
    models, couples = _models(dict(zip(labels, kept, strict=True)), chosen)
    comparisons = compare_models(models, couples, resamples=resamples)
    names = {name for one in comparisons for name in (one.first, one.second)}
    duels = duels_of_scores({name: scores for name, scores in models.items() if name in names})
    about = [run.record.suites[BASE].scorers.get(chosen, "") for run in evaluated]
    return RunComparison(
        judge=chosen,
        about_judge=about[0] if about else "",
        is_share=bool(evaluated) and all(run.summary.share_judge == chosen for run in evaluated),
        groups=tuple(groups),
        contenders=_contenders(models, [BASE, *labels], resamples),
        comparisons=tuple(comparisons),
        power=tuple(_power(models, one) for one in comparisons),
        ranking=rank(duels) if duels else None,
        frontier=tuple(_frontier(groups)),
        base=next((group.points[0] for group in groups if group.points and BASE in models), None),
        settings=differing(dict(zip(labels, (runs[0] for runs in kept), strict=True))),
        problems=tuple(problems + repeated),
    )


def _group(label: str, runs: Sequence[ReadRun], judge: str, resamples: int) -> Group:
    rows = [_compared(run, judge, resamples) for run in runs]
    joined = rows[0].points
    if len(runs) > 1:
        iterations = sorted({number for run in runs for number in run.record.iterations})
        wanted = [[(run, _version(number)) for run in runs] for number in (0, *iterations)]
        joined = _points(wanted, judge, resamples)
    finals = [(run, run.summary.final) for run in runs if run.summary.final is not None]
    result = _point(finals, judge, resamples) if finals else None
    return Group(label, tuple(rows), result, joined)


def _compared(run: ReadRun, judge: str, resamples: int) -> ComparedRun:
    summary, numbers = run.summary, (0, *run.record.iterations)
    seconds = [row.seconds for row in summary.costs if row.seconds is not None]
    peaks = [row.peak_gib for row in summary.costs if row.peak_gib is not None]
    final = summary.final
    return ComparedRun(
        name=run.name,
        folder=run.record.run_dir.as_posix(),
        seed=run.seed,
        state=str(run.record.status.get("state", "unknown")),
        result=None if final is None else int(final.rpartition("-")[2]),
        points=_points([[(run, _version(number))] for number in numbers], judge, resamples),
        evaluations=summary.method_cost,
        minutes=sum(seconds) / 60 if seconds else None,
        peak_gib=max(peaks, default=None),
        alarms=tuple(
            f"{alarm.severity}: {alarm.name}" for alarm in summary.alarms if alarm.severity != "note"
        ),
    )


def _version(number: int) -> str:
    return BASE if number == 0 else f"iteration-{number}"


def _points(wanted: Iterable[Sequence[tuple[ReadRun, str]]], judge: str, resamples: int) -> tuple[Point, ...]:
    found = (_point(chosen, judge, resamples) for chosen in wanted)
    return tuple(point for point in found if point is not None)


def _point(chosen: Sequence[tuple[ReadRun, str]], judge: str, resamples: int) -> Point | None:
    """A version of some runs joined; None where none of them has it."""
    there = [(run, version) for run, version in chosen if version in run.record.suites]
    if not there:
        return None
    suites = [run.record.suites[version] for run, version in there]
    numbers = {0 if version == BASE else int(version.rpartition("-")[2]) for _, version in there}
    spent = [evaluations_until(run.record, 0 if v == BASE else int(v.rpartition("-")[2])) for run, v in there]
    known = [cost for cost in spent if cost is not None]
    own = _joined(suites, judge)
    bases = _joined([run.record.suites[BASE] for run, _ in there if BASE in run.record.suites], judge)
    is_base = numbers == {0}
    change = [] if is_base else compare_models({"own": own, BASE: bases}, resamples=resamples)
    kl = {
        (suite.seed, prompt.id, 0): value
        for suite in suites
        for prompt, value in zip(suite.prompts, suite.kl, strict=False)
    }
    vendi = {(suite.seed, name, 0): value for suite in suites for name, value in suite.vendi.items()}
    return Point(
        iteration=numbers.pop() if len(numbers) == 1 else None,
        seeds=len(there),
        evaluations=sum(known) / len(known) if len(known) == len(spent) else None,
        score=mean_score(own, resamples=resamples),
        gain=change[0].difference if change else None,
        rate=change[0].rate if change else None,
        kl=(0.0, 0.0, 0.0) if is_base else mean_score(kl, resamples=resamples),
        vendi=mean_score(vendi, resamples=resamples),
    )


def _joined(suites: Sequence[SuiteResult], judge: str) -> Scores:
    """Scores of several seeds' evaluations by (seed, prompt, image)."""
    return {
        (suite.seed, prompt, image): value
        for suite in suites
        for (prompt, image), value in suite.by_image(judge).items()
    }


def _models(
    groups: Mapping[str, Sequence[ReadRun]], judge: str
) -> tuple[dict[str, Scores], list[tuple[str, str]]]:
    """Scores of every model by its label, and who is compared with whom: results with each other, with their
    base and with their contenders."""
    models: dict[str, dict[ImageKey, float]] = {}
    couples: list[tuple[str, str]] = []
    keys = {run.base_key for runs in groups.values() for run in runs if BASE in run.record.suites}
    for label, runs in groups.items():
        models[label] = {}
        for run in runs:
            suites = run.record.suites
            own = {label: suites[run.summary.final]} if run.summary.final in suites else {}
            of_base = "" if len(keys) < 2 else f" of {_first_label(groups, run.base_key)}"
            of_group = "" if len(groups) == 1 else f" of {label}"
            own |= {BASE + of_base: suites[BASE]} if BASE in suites else {}
            own |= {f"offline DPO{of_group}": suites[BASELINE]} if BASELINE in suites else {}
            for name, beside in run.record.contenders.items():
                is_base = not beside.config
                own[guidance_title(beside.suite) + of_base if is_base else name + of_group] = beside.suite
            for title, suite in own.items():
                models.setdefault(title, {}).update(_joined([suite], judge))
            couples += [(label, title) for title in own if title != label and label in own]
    names = [label for label in groups if models[label]]
    couples += [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    return {name: scores for name, scores in models.items() if scores}, list(dict.fromkeys(couples))


def _first_label(groups: Mapping[str, Sequence[ReadRun]], base_key: str) -> str:
    return next(label for label, runs in groups.items() if any(run.base_key == base_key for run in runs))


def _contenders(models: Mapping[str, Scores], others: Sequence[str], resamples: int) -> dict[str, Estimate]:
    means = {name: mean_score(own, resamples=resamples) for name, own in models.items() if name not in others}
    return {name: mean for name, mean in means.items() if mean is not None}


def _power(models: Mapping[str, Scores], one: Comparison) -> Power | None:
    """What a comparison can see; None for a single prompt."""
    left, right = models[one.first], models[one.second]
    gaps = {key: left[key] - right[key] for key in left.keys() & right.keys()}
    kept = {key: gap for key, gap in gaps.items() if math.isfinite(gap)}
    if one.num_prompts < 2:
        return None
    images = max(1, round(len(kept) / one.num_prompts))
    spread = measured_spread(list(kept.values()), [key[1] for key in kept])
    found = one.difference[0]
    needed = num_prompts_needed(found, spread, images=images) if found else None
    smallest = detectable_difference(one.num_prompts, spread, images=images)
    return Power(spread, images, one.num_prompts, smallest, needed)


def _frontier(groups: Sequence[Group]) -> list[tuple[str, int]]:
    points: dict[tuple[str, int], tuple[float, float]] = {}
    for group in groups:
        for point in group.points:
            if point.kl is not None and point.score is not None and point.iteration is not None:
                label = BASE if point.iteration == 0 else group.label
                points.setdefault((label, point.iteration), (point.kl[0], point.score[0]))
    return frontier(points)
