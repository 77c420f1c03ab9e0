"""What an evaluation will be able to see, before any of it is drawn: win rates by the number of prompts, and
the measured differences of models that are judged already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffexpo.evaluation.benchmark import Outcome
from diffexpo.evaluation.contenders import finite
from diffexpo.evaluation.planning import (
    detectable_difference,
    detectable_rate,
    measured_spread,
    num_prompts_for_rate,
    num_prompts_needed,
)
from diffexpo.evaluation.records import Json
from diffexpo.evaluation.statistics import LEVEL

SIZES = (50, 100, 200, 500, 1000, 2000)
RATES = (0.55, 0.6, 0.65, 0.7)
TIED = 0.5


@dataclass(frozen=True)
class Visible:
    """The smallest win rates that four of five comparisons of so many prompts tell from one half, without
    ties and where half of the prompts are tied; None where no win rate is large enough."""

    prompts: int
    rate: float | None
    rate_half_tied: float | None


@dataclass(frozen=True)
class Measured:
    """Two models that are judged already: the win rate against `against` over `prompts` of them and the mean
    difference, the smallest ones that the planned number of prompts shows, and how many prompts show the
    measured ones (None: there is none to show)."""

    model: str
    against: str
    prompts: int
    rate: float
    visible_rate: float | None
    rate_needs: int | None
    difference: float
    visible_difference: float
    difference_needs: int | None


@dataclass(frozen=True)
class BenchmarkPlan:
    """`to_draw` counts images by model, `minutes` what they take at the pace of those that are drawn (None:
    none is). `level` is that of a single comparison: 5% shared by all of them, as Holm's first step does."""

    suite: str
    prompts: int
    images_per_prompt: int
    comparisons: int
    level: float
    images: int
    to_draw: Mapping[str, int]
    minutes: Mapping[str, float | None]
    visible: tuple[Visible, ...]
    needed: Mapping[float, int]
    judge: str
    measured: tuple[Measured, ...]

    def to_json(self) -> Json:
        """The plan as JSON values."""
        plain: Json = finite(asdict(self))
        return plain


def visible_rates(prompts: Sequence[int], level: float) -> tuple[Visible, ...]:
    """What each number of prompts shows of a win rate; the images of a prompt count as one, since how much
    they differ is not known before they are drawn."""
    return tuple(
        Visible(count, detectable_rate(count, level=level), detectable_rate(count, ties=TIED, level=level))
        for count in prompts
    )


def needed_prompts(level: float) -> dict[float, int]:
    """How many prompts show each of `RATES`, without ties."""
    return {rate: num_prompts_for_rate(rate, level=level) for rate in RATES}


def measured_couples(
    outcome: Outcome, judge: str, against: str, prompts: int, level: float
) -> tuple[Measured, ...]:
    """What is measured already of each model against one under a judge, and what `prompts` would show.

    A prompt is won where most of its images are: the sign test counts prompts.
    """
    found = []
    other = outcome.model(against)
    for model in outcome.models:
        if model.label == against or judge in (*model.trained_by, *other.trained_by):
            continue
        gaps = model.scores[judge] - other.scores[judge]
        kept = np.flatnonzero(np.isfinite(gaps))
        names = [outcome.rows.prompt_ids[row] for row in kept]
        if len(set(names)) < 2:
            continue
        wins, means = (_means(values, names) for values in (np.sign(gaps[kept]), gaps[kept]))
        signs = np.sign(wins)
        rate, ties = 0.5 + 0.5 * float(signs.mean()), float((signs == 0).mean())
        spread, difference = measured_spread(gaps[kept], names), float(means.mean())
        images = max(1, round(len(kept) / len(means)))
        found.append(
            Measured(
                model=model.label,
                against=against,
                prompts=len(means),
                rate=rate,
                visible_rate=detectable_rate(prompts, ties=ties, level=level) if ties < 1 else None,
                rate_needs=None if rate == 0.5 else num_prompts_for_rate(rate, ties=ties, level=level),
                difference=difference,
                visible_difference=detectable_difference(prompts, spread, images=images, level=level),
                difference_needs=num_prompts_needed(difference, spread, images=images, level=level)
                if difference
                else None,
            )
        )
    return tuple(found)


def _means(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Mean of each name's values."""
    labels = np.unique(names, return_inverse=True)[1]
    return np.bincount(labels, weights=values) / np.bincount(labels)


def shared_level(comparisons: int) -> float:
    """The level of one of several comparisons: shared_level(2) is 0.025."""
    return LEVEL / max(comparisons, 1)


def minutes_left(images: int, drawn: int, seconds: float) -> float | None:
    """How long so many images take at the pace of those that are drawn; None where none is."""
    return images * seconds / drawn / 60 if drawn and math.isfinite(seconds) else None
