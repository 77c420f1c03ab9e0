"""`diffexpo evaluate --plan`: what an evaluation would draw and what it could see, before any image."""

from __future__ import annotations

from dataclasses import replace

from diffexpo.assembly.benchmarking import Evaluating, prepare
from diffexpo.evaluation.benchmark import Outcome
from diffexpo.evaluation.benchmark_plan import (
    SIZES,
    BenchmarkPlan,
    measured_couples,
    minutes_left,
    needed_prompts,
    shared_level,
    visible_rates,
)
from diffexpo.evaluation.gallery import Gallery
from diffexpo.evaluation.kept import FILE, check_suite, read_outcome
from diffexpo.online.loop import Console


def plan_evaluation(asked: Evaluating, console: Console) -> BenchmarkPlan:
    """The plan of an evaluation; writes nothing, and refuses what `evaluate_models` refuses before."""
    found, suite = prepare(asked, console), asked.suite
    rows, against = found.rows, asked.against or asked.entries[0].label
    check_suite(asked.out, suite, rows, {prompt.id: place for place, prompt in enumerate(found.prompts)})
    to_draw: dict[str, int] = {}
    minutes: dict[str, float | None] = {}
    for entry in asked.entries:
        gallery = Gallery(asked.out / "models" / entry.folder, rows)
        to_draw[entry.label] = sum(len(rows.of(batch)) for batch in gallery.missing())
        drawn = len(rows) - to_draw[entry.label]
        minutes[entry.label] = minutes_left(to_draw[entry.label], drawn, gallery.spent("seconds"))
    comparisons = max(len(asked.entries) - 1, 1)
    level, prompts = shared_level(comparisons), len(rows.prompts)
    judge = suite.judges[0].name if suite.judges else ""
    judged = _judged(asked, judge, against)
    return BenchmarkPlan(
        suite=suite.name,
        prompts=prompts,
        images_per_prompt=rows.images_per_prompt,
        comparisons=comparisons,
        level=level,
        images=len(rows),
        to_draw=to_draw,
        minutes=minutes,
        visible=visible_rates(sorted({*SIZES, prompts}), level),
        needed=needed_prompts(level),
        judge=judge,
        measured=() if judged is None else measured_couples(judged, judge, against, prompts, level),
    )


def _judged(asked: Evaluating, judge: str, against: str) -> Outcome | None:
    """What the folder holds of the models that are asked for; None where nothing is compared yet."""
    if not (asked.out / FILE).is_file():
        return None
    outcome = read_outcome(asked.out)
    labels = [entry.label for entry in asked.entries]
    kept = tuple(model for model in outcome.models if model.label in labels and judge in model.scores)
    return replace(outcome, models=kept) if any(model.label == against for model in kept) else None
