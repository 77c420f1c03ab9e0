"""The table of contenders: the run beside the base at several guidances, offline DPO and other models, image
by image on the same prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion.sampling import num_network_evaluations
from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import Json, SuiteResult

Estimate = tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """A model to be put in the table: its evaluation, and the network evaluations that its training took with
    what it drew for that (None: not recorded). `is_base` marks the untrained base, at any guidance."""

    key: str
    title: str
    suite: SuiteResult
    training_evaluations: float | None
    is_base: bool = False


@dataclass(frozen=True)
class ContenderRow:
    """A model in the table.

    `value` is its mean score with a 95% interval, the share that is entirely right where the judge says right
    or wrong. Of the images that it shares with the run's result, `difference` is the mean score of the result
    less its own, `better` and `worse` count where the result scores higher and lower: images repaired and
    broken under a judge of right and wrong. All three are None in the result's own row.
    """

    key: str
    title: str
    is_base: bool
    value: Estimate
    difference: Estimate | None
    better: int | None
    worse: int | None
    training_evaluations: float | None
    image_evaluations: int
    vendi: Estimate | None


@dataclass(frozen=True)
class Contenders:
    """The table; the run's result is its last row."""

    judge: str
    is_share: bool
    num_prompts: int
    rows: tuple[ContenderRow, ...]

    @property
    def result(self) -> ContenderRow:
        """The run's own row."""
        return self.rows[-1]

    @property
    def best_base(self) -> ContenderRow:
        """The base at the guidance with the highest score on these very prompts, which flatters it."""
        return max((row for row in self.rows if row.is_base), key=lambda row: row.value[0])

    def to_json(self) -> Json:
        """The table as JSON values; an interval of one prompt has no ends."""
        rows = [finite(asdict(row)) | {"is_best_base": row is self.best_base} for row in self.rows]
        return asdict(self) | {"rows": rows}


def compare_contenders(
    entries: Sequence[Entry], judge: str, *, is_share: bool, resamples: int, seed: int
) -> Contenders | None:
    """The table of some models; the last one is the run's result, which the others are compared with.

    Args:
        entries: Models with evaluations of the same prompts and noise; at least the base and the result.
            One without an image that the judge scored in the result too is left out.
        judge: Decides; its scores are 1 (right) and 0 (wrong) with `is_share`.
        resamples, seed: Of the bootstrap over prompts.
    Returns:
        The table; None where the judge scored no image of the result, or of no base.
    """
    bootstrap: Json = {"resamples": resamples, "seed": seed}
    result = entries[-1].suite.by_image(judge)
    rows = []
    for entry in entries:
        own = entry.suite.by_image(judge)
        shared = [key for key in own if math.isfinite(own[key]) and math.isfinite(result.get(key, math.nan))]
        if not shared:
            continue
        prompts, scores = [prompt for prompt, _ in shared], np.array([own[key] for key in shared])
        gain = np.array([result[key] for key in shared]) - scores
        is_other = entry is not entries[-1]
        vendi = list(entry.suite.vendi.values())
        rows.append(
            ContenderRow(
                key=entry.key,
                title=entry.title,
                is_base=entry.is_base,
                value=bootstrap_mean(scores, prompts, **bootstrap),
                difference=bootstrap_mean(gain, prompts, **bootstrap) if is_other else None,
                better=int((gain > 0).sum()) if is_other else None,
                worse=int((gain < 0).sum()) if is_other else None,
                training_evaluations=entry.training_evaluations,
                image_evaluations=_image_evaluations(entry.suite.sampler),
                vendi=bootstrap_mean(vendi, **bootstrap) if vendi else None,
            )
        )
    if not rows or rows[-1].key != entries[-1].key or not any(row.is_base for row in rows):
        return None
    return Contenders(judge, is_share, len({prompt for prompt, _ in result}), tuple(rows))


def finite(value: Any) -> Any:
    """A value of JSON with None in place of numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def guidance_title(suite: SuiteResult) -> str:
    """What the base is called in the table: "base, guidance 2.5"."""
    return f"base, guidance {suite.sampler.get('guidance', 1.0):g}"


def _image_evaluations(sampler: Json) -> int:
    settings = SamplerConfig(steps=int(sampler.get("steps", 50)))
    return num_network_evaluations(settings, sampler.get("guidance", 1.0) != 1.0)
