"""The report of a study as Markdown and JSON, from its protocol and its votes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffexpo.config.people import StudyConfig
from diffexpo.evaluation.contenders import finite
from diffexpo.evaluation.people import Comparison, agreement, compare, couples_of, detectable_rate
from diffexpo.evaluation.ranking import Ranked, duels_of_votes, rank
from diffexpo.evaluation.templates import template

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StudyVotes:
    """What a study has gathered: every answer, votes that are missing, why raters are left out (a line each),
    how many repeats were answered as before, the protocol's SHA-256, and what each column holds."""

    rows: Rows
    missing: int
    left_out: Sequence[str]
    repeats_same: int
    digest: str
    columns: Mapping[str, str]


def describe_study(study: StudyConfig, votes: StudyVotes) -> tuple[str, dict[str, Any]]:
    """The report, and its numbers as JSON values.

    Only votes of raters who are not left out count; checks, repeats and skipped questions are none.
    """
    counted = [
        row
        for row in votes.rows
        if row["kind"] == "vote" and not row["is_left_out"] and row["answer"] != "skip"
    ]
    couples = couples_of(list(study.models), study.against)
    comparisons = compare(counted, couples, resamples=study.bootstrap, seed=study.seed)
    duels = {question: duels_of_votes(counted, question) for question in study.questions}
    rankings = {question: rank(own).models if own else () for question, own in duels.items()}
    ranked = {
        model: {q: one for q, own in rankings.items() for one in own if one.name == model}
        for model in study.models
    }
    agreements = []
    for question in study.questions:
        alpha, pairs = agreement(counted, question)
        agreements.append(
            {"question": question, "alpha": None if math.isnan(alpha) else alpha, "pairs": pairs}
        )
    prompts = len({row["prompt_id"] for row in counted})
    kinds = [row["kind"] for row in votes.rows]
    text = template("study_report.md.j2").render(
        study=study,
        rows=len(counted),
        raters=len({row["rater"] for row in counted}),
        prompts=prompts,
        missing=votes.missing,
        questions=study.questions,
        couples=_table(comparisons, couples, study.questions),
        models=[
            {"name": model, "strengths": [_ranked(own.get(question)) for question in study.questions]}
            for model, own in ranked.items()
        ],
        agreements=[
            row | {"alpha": "-" if row["alpha"] is None else f"{row['alpha']:.3f}"} for row in agreements
        ],
        rule=study.rating.exclude,
        left_out=votes.left_out,
        skipped=sum(row["answer"] == "skip" for row in votes.rows),
        checks=kinds.count("check"),
        repeats=kinds.count("repeat"),
        same=votes.repeats_same,
        digest=votes.digest,
        detectable=detectable_rate(max(prompts, 1), study.votes),
        columns=votes.columns,
    )
    numbers = {
        "study": study.name,
        "protocol_sha256": votes.digest,
        "votes": len(counted),
        "missing": votes.missing,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "strengths": {
            model: {question: finite(asdict(one)) for question, one in own.items()}
            for model, own in ranked.items()
        },
        "agreement": agreements,
        "left_out": list(votes.left_out),
    }
    return text, numbers


def _table(
    comparisons: Sequence[Comparison], couples: Sequence[tuple[str, str]], questions: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each couple, a cell for each question."""
    found = {(one.first, one.second, one.question): one for one in comparisons}
    return [
        {
            "first": first,
            "second": second,
            "cells": [_cell(found.get((first, second, question))) for question in questions],
        }
        for first, second in couples
    ]


def _ranked(one: Ranked | None) -> str:
    if one is None:
        return "-"
    mean, low, high = (100 * value for value in one.against_average)
    ends = "" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]"
    ranks = f"{one.best}" if one.best == one.worst else f"{one.best} to {one.worst}"
    return f"{mean:.1f}%{ends}<br>rank {ranks}"


def _cell(one: Comparison | None) -> str:
    if one is None:
        return "-"
    interval = f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"{100 * one.rate:.1f}% {interval}<br>{one.wins} / {one.ties} / {one.losses}"
