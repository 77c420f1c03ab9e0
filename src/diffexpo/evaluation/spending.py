"""What an iterate has cost: the part of a run's spending that its training needed."""

from __future__ import annotations

from collections.abc import Sequence

from diffexpo.evaluation.records import Json, RunRecord, iteration_of
from diffexpo.evaluation.summary import cost_of_method, cost_rows
from diffexpo.evaluation.wording import describe_method


def evaluations_until(record: RunRecord, iteration: int) -> float | None:
    """Network evaluations of collecting and training until an iterate is there, a backward pass counting two;
    0 for the base, None where they were not recorded."""
    if iteration == 0:
        return 0.0
    draws_first = describe_method(record.config).card.draws_first
    spent = spent_until(record.metrics, iteration, draws_first)
    return cost_of_method(cost_rows(spent, record.config, {}))


def spent_until(metrics: Sequence[Json], iteration: int, draws_first: bool) -> list[Json]:
    """The lines of metrics.jsonl that an iterate's training needed: those of earlier iterations and of its
    own training, and what it collected itself where a method draws before it trains."""
    return [
        line
        for line in metrics
        if iteration_of(line) < iteration
        or (iteration_of(line) == iteration and (draws_first or str(line.get("phase")).startswith("train")))
    ]
