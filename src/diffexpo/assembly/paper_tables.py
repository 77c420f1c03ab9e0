"""`diffexpo table`: the tables of papers from evaluations at hand, beside the published numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffexpo.assembly.measuring import vendi_of
from diffexpo.config.paper_tables import Column, PaperTable, find_table
from diffexpo.errors import MissingError
from diffexpo.evaluation.benchmark import Judge, Judged, Outcome
from diffexpo.evaluation.benchmark_page import markdown, number, win_text
from diffexpo.evaluation.kept import FILE, read_outcome
from diffexpo.evaluation.totals import Estimate

NOTHING = "-"


def paper_table(name: str, folders: Sequence[Path]) -> list[str]:
    """A paper's table as Markdown lines: what is evaluated in the folders, then what was published.

    Args:
        name: A key of `config.paper_tables.TABLES`.
        folders: Folders of evaluations; a model is one row, by its label, whatever suites it is in.
    Raises:
        MissingError: there is no such table, or no evaluation has anything for it.
    """
    table = find_table(name)
    outcomes = [read_outcome(folder) for folder in folders]
    labels = dict.fromkeys(model.label for outcome in outcomes for model in outcome.models)
    rows: list[list[str]] = []
    judges: dict[str, Judge] = {}
    for label in labels:
        cells = [_cell(column, label, outcomes) for column in table.columns]
        judges |= {judge.name: judge for _, judge in cells if judge is not None}
        if any(text != NOTHING for text, _ in cells):
            rows.append([label, *(text for text, _ in cells)])
    if not rows:
        needed = dict.fromkeys(column.suite for column in table.columns)
        commands = "; ".join(f"diffexpo evaluate MODEL... --suite {suite}" for suite in needed)
        told = ", ".join(str(folder) for folder in folders) or "no folder"
        raise MissingError(f"table {name}: nothing is evaluated for it in {told}. It needs: {commands}")
    return [*_lines(table, rows), *_judges(judges.values())]


def evaluations_in(folder: Path) -> list[Path]:
    """The folders of evaluations in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{FILE}"))


def _lines(table: PaperTable, rows: list[list[str]]) -> Iterator[str]:
    header = ["model", *(column.title for column in table.columns)]
    yield f"# {table.title}"
    yield ""
    yield "Evaluated here, with 95% intervals over prompts:"
    yield ""
    yield from markdown(header, rows).splitlines()
    yield ""
    if table.published:
        yield f"Published: {table.source}."
        yield ""
        yield from markdown(header, [[name, *texts] for name, texts in table.published.items()]).splitlines()
        yield ""
    yield from (f"- {text}" for text in table.scales)


def _judges(judges: Iterable[Judge]) -> Iterator[str]:
    for judge in judges:
        yield f"- {judge.name}: {judge.what}; {judge.unit}; version {judge.version[:16]}."


def _cell(column: Column, label: str, outcomes: Sequence[Outcome]) -> tuple[str, Judge | None]:
    """The text of a cell, and the judge behind it."""
    for outcome in outcomes:
        model = next((model for model in outcome.models if model.label == label), None)
        judge = next((judge for judge in outcome.judges if judge.type == column.judge), None)
        if outcome.suite.name != column.suite or model is None or (judge is None and column.judge):
            continue
        if column.what == "vendi":
            diversity = vendi_of(outcome, model)
            return (NOTHING if diversity is None else _interval(*(f"{end:.2f}" for end in diversity))), None
        assert judge is not None  # only Vendi has none
        if column.what == "win_rate":
            first = outcome.models[0].label
            return (NOTHING if label == first else win_text(outcome.wins(judge.name, first)[label])), judge
        return _mean(outcome, model, judge, column.category), judge
    return NOTHING, None


def _mean(outcome: Outcome, model: Judged, judge: Judge, category: str) -> str:
    key = (model.label, judge.name)
    found: Estimate | None = outcome.totals[key]
    if category:
        groups = {group.name: group for group in outcome.groups.get("category", [])}
        found = groups[category].means[key] if category in groups else None
    if found is None:
        return NOTHING
    mark = " (trained on it)" if judge.name in model.trained_by else ""
    return _interval(*(number(value, judge) for value in found)) + mark


def _interval(mean: str, low: str, high: str) -> str:
    return f"{mean} [{low}, {high}]"
