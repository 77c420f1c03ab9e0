"""What a score gained from one evaluated version to another, image by image, and how much intervals say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import Json, SuiteResult

Estimate = tuple[float, float, float]

FEW_RESAMPLES, FEW_PROMPTS = 200, 10


def paired_change(
    before: SuiteResult, after: SuiteResult, scorer: str | None, bootstrap: Json
) -> Estimate | None:
    """Mean gain, with its 95% interval over prompts, on the images that both versions hold (same prompt, same
    noise) and that could be scored in both; None where there is none."""
    old, new = (suite.by_image(scorer or "") for suite in (before, after))
    shared = [key for key in old if math.isfinite(old[key]) and math.isfinite(new.get(key, math.nan))]
    if not shared:
        return None
    return bootstrap_mean([new[key] - old[key] for key in shared], [key[0] for key in shared], **bootstrap)


def gains_on_earlier(
    suites: Mapping[str, SuiteResult], number: int, scorer: str | None, bootstrap: Json
) -> dict[int, Estimate]:
    """`paired_change` of an iterate against the base (0) and every earlier iterate that was evaluated."""
    named = {0: "base"} | {earlier: f"iteration-{earlier}" for earlier in range(1, number)}
    found = {
        earlier: paired_change(suites[name], suites[f"iteration-{number}"], scorer, bootstrap)
        for earlier, name in named.items()
        if name in suites
    }
    return {earlier: gain for earlier, gain in found.items() if gain is not None}


def interval_notes(resamples: int, suites: Iterable[SuiteResult]) -> list[str]:
    """What makes a run's intervals say little, one sentence each."""
    notes, prompts = [], min(len(suite.prompts) for suite in suites)
    if resamples < FEW_RESAMPLES:
        few = f"Intervals come from {resamples} bootstrap resample{'s' * (resamples != 1)}"
        notes.append(
            f"{few} (evaluation.bootstrap), too few for their ends to mean anything; 1000 are enough."
        )
    if prompts < FEW_PROMPTS:
        notes.append(
            f"The evaluation has {prompts} prompt{'s' * (prompts != 1)}: bootstrap intervals over fewer than "
            f"{FEW_PROMPTS} are too narrow."
        )
    return notes
