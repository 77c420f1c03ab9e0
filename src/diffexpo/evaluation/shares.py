"""Shares of images that are entirely right, by group of prompts, where a judge says right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffexpo.config.rewards import REWARDS
from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import Json, SuiteResult
from diffexpo.types import Prompt

Estimate = tuple[float, float, float]
ALL = "all"


@dataclass(frozen=True)
class ShareRow:
    """One group of prompts: the share of right images of each version, in [0, 1].

    `change` is the last version's share less the base's, a mean over prompts with its 95% interval;
    `repaired` and `broken` count images that were wrong and became right, and the other way round.
    """

    group: str
    num_prompts: int
    shares: Mapping[str, float]
    change: Estimate
    repaired: int
    broken: int


def share_judge(config: Json, roles: Mapping[str, str]) -> str | None:
    """The first held-out judge of a run whose scores are 1 (right) or 0 (wrong)."""
    judges = config.get("evaluation", {}).get("judges", [])
    known = {judge["name"]: REWARDS.get(judge.get("type", "")) for judge in judges}
    right_or_wrong = {name for name, card in known.items() if card is not None and card.is_right_or_wrong}
    return next((name for name, role in roles.items() if role == "heldout" and name in right_or_wrong), None)


def share_rows(
    suites: Mapping[str, SuiteResult], judge: str, final: str, *, resamples: int, seed: int
) -> list[ShareRow]:
    """A row for all prompts, for each category, and for each value of an attribute that all prompts state.

    Args:
        suites: Versions with the same prompts; "base" is what `final` is compared with.
        judge: Scores of 1 or 0 in all of them; rows that it could not score in both are left out.
        resamples, seed: Of the bootstrap over prompts.
    """
    base, last = suites["base"], suites[final]
    kept = base.scored & np.isfinite(base.scores[judge]) & np.isfinite(last.scores[judge])
    rows = []
    for group, members in _groups(base.prompts).items():
        chosen = kept & np.isin(base.prompt_index, members)
        if not chosen.any():
            continue
        before, after = base.scores[judge][chosen] > 0.5, last.scores[judge][chosen] > 0.5
        ids = list(np.array(base.prompt_ids())[chosen])
        shares = {name: float((suite.scores[judge][chosen] > 0.5).mean()) for name, suite in suites.items()}
        change = bootstrap_mean(after.astype(float) - before, ids, resamples=resamples, seed=seed)
        counts = int((after & ~before).sum()), int((before & ~after).sum())
        rows.append(ShareRow(group, len(set(ids)), shares, change, *counts))
    return rows


def _groups(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Positions of the prompts of each group, by name after `ALL`; only that where they have no category."""
    groups: dict[str, list[int]] = {}
    stated = set.intersection(*(set(prompt.attributes) for prompt in prompts))
    for position, prompt in enumerate(prompts):
        values = [prompt.category] if prompt.category else []
        values += [f"{name}: {prompt.attributes[name]}" for name in sorted(stated)]
        for value in values:
            groups.setdefault(value, []).append(position)
    return {ALL: list(range(len(prompts))), **dict(sorted(groups.items()))}
