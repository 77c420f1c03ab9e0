"""An audit's numbers from drawn images: who is drawn, how good, how much of it is unsafe.

A classifier is any scorer of an image for a text; it says the value whose text scores best. Its error is
measured on labelled images, and a value of which it does not recognise more than half is not reported on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.audit import AttributeConfig, AuditConfig
from diffexpo.errors import DataError
from diffexpo.evaluation.bias import (
    Calibration,
    Interval,
    Mix,
    calibrate,
    difference,
    measure_mix,
    wilson_interval,
)
from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import SuiteResult
from diffexpo.rewards.classifier import value_probabilities
from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Prompt, Reward

ANY_GROUP = "all"
_BATCH = 64
Labelled = tuple[np.ndarray, Prompt]
"""An image (H, W, 3) of uint8, and its prompt with what it shows as attributes."""


@dataclass(frozen=True)
class Scorers:
    """Who reads the images of an audit: the classifier, who says what is readable, judges of quality, and
    classifiers of safety."""

    classifier: Reward | None = None
    readable: Reward | None = None
    judges: Sequence[Reward] = ()
    safety: Sequence[Reward] = ()


@dataclass(frozen=True)
class AttributeResult:
    """One attribute: its values, what the classifier recognises of each (None: not measured), values that it
    is no witness of, each model's mix, and the last model's mean distance less the first one's."""

    values: tuple[str, ...]
    recall: tuple[float, ...] | None
    labelled: int
    unrecognised: tuple[str, ...]
    mixes: Mapping[str, Mix]
    change: Interval | None


@dataclass(frozen=True)
class UnsafeShare:
    """Images of one list that a classifier calls unsafe: the share with its interval, and their rows."""

    share: Interval
    unsafe: int
    images: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class AuditResult:
    """Everything that an audit has measured. `quality`: judge -> model -> mean; `safety`: list of prompts ->
    classifier -> model -> share."""

    attributes: Mapping[str, AttributeResult]
    quality: Mapping[str, Mapping[str, Interval]]
    readable: Mapping[str, Interval]
    safety: Mapping[str, Mapping[str, Mapping[str, UnsafeShare]]]
    suites: Mapping[str, Mapping[str, SuiteResult]] = field(default_factory=dict)


def group_of(prompt: Prompt, group_by: str) -> str:
    """The group whose images are counted together."""
    return prompt.attributes.get(group_by) or prompt.category or prompt.text


def measure_audit(
    audit: AuditConfig,
    scorers: Scorers,
    suites: Mapping[str, Mapping[str, SuiteResult]],
    labelled: Sequence[Labelled] | None,
) -> AuditResult:
    """Read and count the images.

    Args:
        suites: List of prompts ("open", "neutral", "provoking") -> model -> its images; models in order, the
            first is what the last is compared with.
        labelled: Images on which the classifier's error is measured; None corrects nothing.
    Raises:
        DataError: no image can be read, or a labelled image has no known value.
    """
    drawn = suites.get("open", {})
    is_read = {model: _readable(audit, scorers.readable, suite) for model, suite in drawn.items()}
    attributes = {}
    if scorers.classifier is not None:
        for name, attribute in audit.attributes.items():
            attributes[name] = _measure_attribute(
                audit, name, attribute, scorers.classifier, drawn, is_read, labelled
            )
    return AuditResult(
        attributes=attributes,
        quality=_quality(audit, scorers.judges, drawn),
        readable={
            model: wilson_interval(int(mask.sum()), len(mask))
            for model, mask in is_read.items()
            if scorers.readable is not None
        },
        safety={
            kind: _unsafe(audit, scorers.safety, suites[kind])
            for kind in ("neutral", "provoking")
            if kind in suites and scorers.safety
        },
        suites=suites,
    )


def said_of(
    scorer: Reward, attribute: AttributeConfig, images: np.ndarray, prompts: Sequence[str]
) -> np.ndarray:
    """Number of the value that a classifier says of each image (N,), -1 where it says nothing."""
    found = []
    for start in range(0, len(images), _BATCH):
        rows = slice(start, start + _BATCH)
        p = value_probabilities(scorer, attribute.values, as_tensor(images[rows]), prompts[rows])
        said = p.argmax(dim=1)
        found.append(torch.where(torch.isfinite(p).all(dim=1), said, -1).cpu().numpy())
    return np.concatenate(found)


def as_tensor(images: np.ndarray) -> Tensor:
    """Images (N,H,W,3) of uint8 as (N,3,H,W) in [0,1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255.0)


def calibration_of(
    name: str, attribute: AttributeConfig, scorer: Reward, labelled: Sequence[Labelled], group_by: str
) -> Calibration:
    """What a classifier says of labelled images; a DataError names the label that is missing or unknown."""
    known = [(image, prompt) for image, prompt in labelled if name in prompt.attributes]
    if not known:
        raise DataError(
            f"attribute {name}: no labelled image says it; expected labels of {name} in `labelled`"
        )
    texts = [prompt.text for _, prompt in known]
    said = np.concatenate(
        [
            said_of(scorer, attribute, image[None], [text])
            for (image, _), text in zip(known, texts, strict=True)
        ]
        if len({image.shape for image, _ in known}) > 1
        else [said_of(scorer, attribute, np.stack([image for image, _ in known]), texts)]
    )
    values = tuple(attribute.values)
    heard = [number for number, value in enumerate(said) if value >= 0]
    try:
        return calibrate(
            values,
            [group_of(known[number][1], group_by) for number in heard],
            [known[number][1].attributes[name] for number in heard],
            [values[said[number]] for number in heard],
        )
    except DataError as error:
        raise DataError(f"attribute {name}: {error}") from None


# Many parameters because an attribute is measured with all of them.
def _measure_attribute(
    audit: AuditConfig,
    name: str,
    attribute: AttributeConfig,
    scorer: Reward,
    drawn: Mapping[str, SuiteResult],
    is_read: Mapping[str, np.ndarray],
    labelled: Sequence[Labelled] | None,
) -> AttributeResult:
    values = tuple(attribute.values)
    calibration = None
    if labelled is not None:
        calibration = calibration_of(name, attribute, scorer, labelled, audit.group_by)
    bad = () if calibration is None else tuple(calibration.unrecognised)
    mixes: dict[str, Mix] = {}
    for model, suite in drawn.items() if not bad else ():
        texts = [suite.prompts[index].text for index in suite.prompt_index]
        groups = [group_of(suite.prompts[index], audit.group_by) for index in suite.prompt_index]
        said = said_of(scorer, attribute, suite.images, texts)
        counts = {group: [0] * len(values) for group in groups}
        unread = dict.fromkeys(counts, 0)
        for group, value, clear in zip(groups, said, is_read[model], strict=True):
            if clear and value >= 0:
                counts[group][value] += 1
            else:
                unread[group] += 1
        mixes[model] = measure_mix(
            counts,
            unread,
            calibration,
            {group: shares for group in counts if (shares := _reference(attribute, group)) is not None},
            resamples=audit.resamples,
            key=(audit.seed, "audit", name, model),
        )
    found = list(mixes.values())
    return AttributeResult(
        values=values,
        recall=None if calibration is None else tuple(float(share) for share in calibration.recall),
        labelled=0 if calibration is None else int(calibration.counts.sum()),
        unrecognised=bad,
        mixes=mixes,
        change=difference(found[-1], found[0]) if len(found) > 1 else None,
    )


def _reference(attribute: AttributeConfig, group: str) -> list[float] | None:
    mix = attribute.reference.get(group, attribute.reference.get(ANY_GROUP))
    return None if mix is None else [mix.get(value, 0.0) for value in attribute.values]


def _scores(scorer: Reward, suite: SuiteResult) -> np.ndarray:
    texts = [suite.prompts[index].text for index in suite.prompt_index]
    return score_drawn([scorer], Drawn(None, as_tensor(suite.images)), texts)[scorer.name]


def _readable(audit: AuditConfig, scorer: Reward | None, suite: SuiteResult) -> np.ndarray:
    """Mask (N,) of the images that show what their prompt names."""
    if scorer is None:
        return np.ones(len(suite.images), dtype=bool)
    return _scores(scorer, suite) >= audit.readable_from  # NaN is not


def _quality(
    audit: AuditConfig, judges: Sequence[Reward], drawn: Mapping[str, SuiteResult]
) -> dict[str, dict[str, Interval]]:
    return {
        judge.name: {
            model: bootstrap_mean(_scores(judge, suite), resamples=audit.resamples, seed=audit.seed)
            for model, suite in drawn.items()
        }
        for judge in judges
    }


def _unsafe(
    audit: AuditConfig, classifiers: Sequence[Reward], drawn: Mapping[str, SuiteResult]
) -> dict[str, dict[str, UnsafeShare]]:
    found: dict[str, dict[str, UnsafeShare]] = {}
    for scorer in classifiers:
        for model, suite in drawn.items():
            scores = _scores(scorer, suite)
            known = np.isfinite(scores)
            if not known.any():
                raise DataError(
                    f"{scorer.name} scored none of {len(scores)} images; look at the warnings above"
                )
            rows = tuple(int(row) for row in np.flatnonzero(known & (scores < audit.safety.safe_from)))
            share = wilson_interval(len(rows), int(known.sum()))
            found.setdefault(scorer.name, {})[model] = UnsafeShare(share, len(rows), int(known.sum()), rows)
    return found
