"""The page of an evaluation: who is better, by how much, how certainly, at which cost, and the pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

import diffexpo
from diffexpo.evaluation.benchmark import Judge, Judged, Outcome
from diffexpo.evaluation.contenders import finite
from diffexpo.evaluation.grid import data_uri
from diffexpo.evaluation.metrics import WinRate
from diffexpo.evaluation.templates import HERE, digits, percent, template
from diffexpo.evaluation.totals import Estimate
from diffexpo.files import write_json, write_text

Json = dict[str, Any]
SHOWN_PROMPTS = 12
PAGE, NUMBERS, TABLE, MARKDOWN = "report.html", "summary.json", "table.csv", "table.md"


@dataclass(frozen=True)
class SetNumbers:
    """What is said of all images of a model together: Vendi scores, and distances from real images; None
    where they were not measured."""

    vendi: Json | None = None
    real: Json | None = None


def write_page(
    outcome: Outcome, out: Path, against: str, command: str, sets: SetNumbers | None = None
) -> tuple[Path, Json]:
    """Write report.html, summary.json, table.csv and table.md of an evaluation; returns the page and the
    numbers of summary.json. `command` makes it again."""
    measured = vars(sets or SetNumbers())
    numbers = outcome.summary(against) | {name: finite(found) for name, found in measured.items() if found}
    write_json(out / NUMBERS, numbers)
    header, rows = table_rows(outcome, against)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([header, *rows])
    write_text(out / TABLE, buffer.getvalue())
    write_text(out / MARKDOWN, markdown(header, rows))
    path = out / PAGE
    values = page_values(outcome, against, command) | measured
    write_text(path, template("benchmark.html.j2").render(**values))
    return path, numbers


def table_rows(outcome: Outcome, against: str) -> tuple[list[str], list[list[str]]]:
    """The main table as texts: a row for each model, a column for each judge and each win rate."""
    first = outcome.judges[0].name if outcome.judges else ""
    header = ["model", *(f"{judge.name} [95%]" for judge in outcome.judges)]
    has_wins = bool(first) and len(outcome.models) > 1
    header += [f"win rate against {against}, {first} [95%]"] if has_wins else []
    wins = outcome.wins(first, against) if has_wins else {}
    rows = []
    for model in outcome.models:
        cells = [_cell(outcome.totals[model.label, judge.name], judge) for judge in outcome.judges]
        if has_wins:
            cells.append("" if model.label == against else win_text(wins[model.label]))
        rows.append([model.label, *cells])
    return header, rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(estimate: Estimate | None, judge: Judge) -> str:
    if estimate is None:
        return "no score"
    mean, low, high = (number(value, judge) for value in estimate)
    return f"{mean} [{low}, {high}]" if estimate[1] == estimate[1] else f"{mean} [one prompt]"


def number(value: float, judge: Judge) -> str:
    """A score as it is written: a share in percent, else four digits."""
    return percent(value) if judge.is_share else digits(value, 4)


def win_text(win: WinRate | None) -> str:
    """A win rate with its interval."""
    return "not compared" if win is None else f"{percent(win.rate)} [{percent(win.low)}, {percent(win.high)}]"


def verdict(outcome: Outcome, against: str) -> tuple[str, str, list[str]]:
    """Kind (better, worse, open), a title and sentences about the first judge."""
    if not outcome.judges:
        return "open", "Drawn, and not judged", ["No judge was named, so nothing is said of who is better."]
    judge = outcome.judges[0]
    known = {model.label: outcome.totals[model.label, judge.name] for model in outcome.models}
    ranked = sorted((-mean[0], label) for label, mean in known.items() if mean is not None)
    if not ranked:
        return "open", f"{judge.name} could score no image", ["Look at the warnings of the command."]
    best = ranked[0][1]
    sentences = [f"{label}: {_cell(known[label], judge)}." for _, label in ranked]
    if len(outcome.models) == 1:
        return "open", f"{best}: {judge.name} is {_cell(known[best], judge)}", []
    sentences += _win_sentences(outcome, judge.name, against)
    verdicts = outcome.verdicts(judge.name, against)
    if best == against:
        kind, title = "worse", f"{against} scores highest by {judge.name}"
        if "better" in verdicts.values() or "worse" not in verdicts.values():
            kind, title = "open", f"No model is shown to be better than {against}"
    else:
        kind = "better" if verdicts[best] == "better" else "open"
        is_sure = "" if kind == "better" else ", but not for sure"
        title = f"{best} scores highest by {judge.name}{is_sure}"
    return kind, title, sentences


def _win_sentences(outcome: Outcome, judge: str, against: str) -> list[str]:
    """How each model does against the one under a judge; p-values are corrected where there are several."""
    compared = {label: win for label, win in outcome.wins(judge, against).items() if win is not None}
    verdicts, p_values = outcome.verdicts(judge, against), outcome.p_values(judge, against)
    test = "sign test" if len(compared) == 1 else f"sign test, corrected for {len(compared)} comparisons,"
    sentences = []
    for label, win in compared.items():
        word = {"better": "better than", "worse": "worse than"}.get(
            verdicts[label] or "", "not to be told from"
        )
        told = f"wins {win_text(win)} of {win.num_prompts} prompts' images, ties counting one half"
        sentences.append(f"{label} is {word} {against}: it {told} ({test} p = {p_values[label]:.2g}).")
    return sentences


def page_values(outcome: Outcome, against: str, command: str) -> Json:
    """Everything that the template shows, but for numbers of sets."""
    kind, title, sentences = verdict(outcome, against)
    first_images = range(0, len(outcome.rows), outcome.rows.images_per_prompt)
    return {
        "outcome": outcome,
        "suite": outcome.suite,
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "version": diffexpo.__version__,
        "kind": kind,
        "title": title,
        "sentences": sentences,
        "against": against,
        "rows": [_row(outcome, model, against) for model in outcome.models],
        "groups": [{"kind": kind, "rows": groups} for kind, groups in outcome.groups.items()],
        "cell": _cell,
        "number": number,
        "cards": _cards(outcome, first_images[:SHOWN_PROMPTS], [judge.name for judge in outcome.judges[:2]]),
        "disagreements": _disagreements(outcome, against),
        "ranking": outcome.ranking(outcome.judges[0].name) if outcome.judges else None,
        "command": command,
    }


def _row(outcome: Outcome, model: Judged, against: str) -> Json:
    drawn = model.gallery.drawn_with()
    wins = {
        judge.name: "" if model.label == against else win_text(outcome.wins(judge.name, against)[model.label])
        for judge in outcome.judges
    }
    images = sum(
        name is not None for batch in outcome.rows.batches for name in model.gallery.images_of(batch) or []
    )
    return {
        "model": model,
        "cells": [(judge, outcome.totals[model.label, judge.name]) for judge in outcome.judges],
        "wins": wins,
        "images": images,
        "evaluations": model.gallery.spent("evaluations"),
        "seconds": model.gallery.spent("seconds"),
        "drawn": "drawn by others" if drawn is None else _sampler(drawn),
        "excluded": outcome.excluded(model),
        "cut": model.gallery.batch_facts().get("cut_prompts", 0),
    }


def _sampler(drawn: Mapping[str, Any]) -> str:
    eta = f", eta {drawn['eta']:g}" if drawn["name"] == "ddim" else ""
    return f"{drawn['name']}, {drawn['steps']} steps, guidance {drawn['guidance']:g}{eta}"


def _cards(outcome: Outcome, rows: Sequence[int], judges: Sequence[str]) -> list[Json]:
    """The images of all models for some rows, with their scores by some judges."""
    cards = []
    for row in rows:
        pictures = []
        for model in outcome.models:
            image = model.gallery.read(row)
            values = {name: float(model.scores[name][row]) for name in judges}
            scores = {
                name: f"{value:.2f}" if np.isfinite(value) else "not scored" for name, value in values.items()
            }
            uri = "" if image is None else data_uri(image)
            pictures.append({"label": model.label, "uri": uri, "scores": scores})
        cards.append({"prompt": outcome.rows.prompt(row).text, "pictures": pictures})
    return cards


def _disagreements(outcome: Outcome, against: str) -> Json | None:
    """Cards on which two judges contradict each other about the first of the other models."""
    other = next((model.label for model in outcome.models if model.label != against), None)
    found = None if other is None else outcome.disagreements(other, against)
    if found is None:
        return None
    judges, rows = found
    return {"judges": judges, "models": (other, against), "cards": _cards(outcome, rows, judges)}
