"""Everything on the report's page except its figures: cards with images, tables, commands."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

import diffexpo
from diffexpo.bounded.images import read_image
from diffexpo.config import read_resolved
from diffexpo.config.citations import citations
from diffexpo.config.load import leaves
from diffexpo.errors import DataError, DiffexpoError
from diffexpo.evaluation.audit_numbers import AUDIT, PAGE, drawn_rows, read_numbers, safety_lines
from diffexpo.evaluation.card import CARD
from diffexpo.evaluation.grid import data_uri, save_comparison
from diffexpo.evaluation.records import Json, RunRecord, SuiteResult
from diffexpo.evaluation.signal import signal_sentences
from diffexpo.evaluation.summary import BASELINE, Summary
from diffexpo.evaluation.verdict import equal_cost, give_verdict

MAX_CARDS = 24
MAX_EXTREMES = 6
KEPT = ("groups", "count", "dropped_ties", "dropped_nan", "margin_mean")
PEOPLE = ("asked", "pairs", "ties", "disagreed", "votes", "agreement")
ORIGINS = ("winner_from_exploration", "winner_from_negative")


def page_values(record: RunRecord, summary: Summary) -> Json:
    """Everything the template shows except the figures."""
    config = record.config
    return {
        "version": diffexpo.__version__,
        "name": config.get("name", record.run_dir.name),
        "run_dir": record.run_dir.as_posix(),
        "config": config,
        "state": record.status.get("state", "unknown"),
        "summary": summary,
        "verdict": give_verdict(summary),
        "equal_cost": equal_cost(summary),
        "method": summary.method,
        "labels": {name: summary.method.label(name) for name in record.suites},
        "suites": record.suites,
        "grid": _grid(record, summary),
        "extremes": _extremes(record, summary),
        "pairs": _pairs(record, summary),
        "pairing": pairing_rows(record.metrics),
        "people": people_rows(record.metrics),
        "drawn": audit_of(record.run_dir),
        "signal": signal_sentences(record.metrics, config.get("algorithm", {}).get("draws", 1)),
        "tuning": config.get("tuning", {}).get("kind", "full"),
        "base_path": config.get("model", {}).get("path", ""),
        "config_text": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "env_rows": list(leaves(record.env)) if record.env else [],
        "baseline": BASELINE,
        "cite": _cited(record.run_dir),
        "usage": usage_code(record.run_dir),
    }


def usage_code(run_dir: Path) -> str:
    """The Python of the export's card, which draws with the sampler that was evaluated, as it runs beside the
    run's folder; "" where nothing is exported."""
    folder = run_dir / "export"
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    code = found[1].rstrip() if found else ""
    code = code.replace('"."', repr(folder.as_posix())).replace("'.'", repr(folder.as_posix()))
    return re.sub(r"'(\.\./[^']*)'", lambda base: repr(os.path.normpath(folder / base[1])), code)


def _cited(run_dir: Path) -> list[str]:
    """What to cite, one line per work; nothing for settings that this version refuses."""
    try:
        config = read_resolved(run_dir / "config.yaml").config
    except DiffexpoError:
        return []
    return citations(config).as_text().splitlines()


def _grid(record: RunRecord, summary: Summary) -> list[Json]:
    """Cards of the first prompts in keyed order, one image per version; also saved as one sheet."""
    names = [name for name in ("base", BASELINE, summary.final) if name in record.suites]
    versions = [(summary.method.label(name), record.suites[name]) for name in names]
    if not versions:
        return []
    wanted = int(record.config.get("evaluation", {}).get("grid_prompts", 8))
    prompts = versions[0][1].prompts[: min(wanted, MAX_CARDS)]
    if not prompts:
        return []
    save_comparison(record.run_dir / "eval" / "grid.png", versions, prompts)
    return [
        _card(prompt.text, [(label, suite, suite.row_of(prompt.id)) for label, suite in versions], summary)
        for prompt in prompts
    ]


def _card(text: str, drawn: Sequence[tuple[str, SuiteResult, int | None]], summary: Summary) -> Json:
    """A prompt with its image by each version, of those rows that were drawn."""
    pictures = [
        {
            "label": label,
            "uri": data_uri(suite.images[row]),
            "width": suite.images[row].shape[1],
            "score": _score(suite, summary.judge, row),
        }
        for label, suite, row in drawn
        if row is not None
    ]
    return {"prompt": text, "pictures": pictures}


def _extremes(record: RunRecord, summary: Summary) -> Json:
    """Cards of the images that the result gained and lost most under the deciding judge, base beside it."""
    suites, final, judge = record.suites, summary.final, summary.judge
    if final is None or judge is None or "base" not in suites or judge not in suites[final].scores:
        return {"wins": [], "losses": []}
    base, result = suites["base"], suites[final]
    before, after = base.by_image(judge), result.by_image(judge)
    gains = {key: after[key] - before[key] for key in after if key in before}
    order = sorted((key for key in gains if np.isfinite(gains[key])), key=lambda key: (-gains[key], key))
    texts = {prompt.id: prompt.text for prompt in result.prompts}

    def card(key: tuple[str, int]) -> Json:
        sides = (summary.method.label("base"), base), (summary.method.label(final), result)
        return _card(texts[key[0]], [(label, suite, suite.row_of(*key)) for label, suite in sides], summary)

    return {
        "wins": [card(key) for key in order[:MAX_EXTREMES] if gains[key] > 0],
        "losses": [card(key) for key in order[::-1][:MAX_EXTREMES] if gains[key] < 0],
    }


def _score(suite: SuiteResult, judge: str | None, row: int) -> str:
    score = suite.scores[judge][row] if judge in suite.scores else np.nan
    return f"{score:.2f}" if np.isfinite(score) else "not scored"


def _image_of(path: Path, problems: list[str]) -> np.ndarray | None:
    """An image; None without one, and for a file that is none, which becomes a sentence in `problems`."""
    try:
        return read_image(path) if path.is_file() else None
    except DataError as error:
        problems.append(f"{error}.")
        return None


def _pairs(record: RunRecord, summary: Summary) -> list[Json]:
    """Cards of the example pairs; for a method that learns from no pairs, its best and worst images."""
    folder, method = record.run_dir / "eval" / "pairs", summary.method
    names = {} if method.card.has_pairs else {"winner": "best", "loser": "worst"}
    cards = []
    for example in record.examples[:MAX_CARDS]:
        sides = []
        for side in ("winner", "loser"):
            path = folder / str(vars(example)[f"{side}_image"])
            scores = vars(example)[f"{side}_scores"].items()
            image = _image_of(path, summary.problems)
            shown = {
                "side": names.get(side, side),
                "uri": "" if image is None else data_uri(image),
                "width": 0 if image is None else image.shape[1],
                "agent": vars(example)[f"{side}_agent"] if method.has_agents else "",
                "negative": vars(example)[f"{side}_negative"],
                "scores": ", ".join(f"{name} {value:.2f}" for name, value in scores if value is not None),
            }
            sides.append(shown)
        cards.append({"example": example, "sides": sides})
    return cards


def pairing_rows(metrics: Sequence[Json]) -> list[Json]:
    """What pairing kept and dropped, one row per iteration; None where a number is not recorded."""
    return [
        {"iteration": line.get("iteration")} | {name: line.get(f"pairs/{name}") for name in (*KEPT, *ORIGINS)}
        for line in metrics
        if line.get("phase") == "pair"
    ]


def audit_of(run_dir: Path) -> Json:
    """What an audit of the run has found; empty where there is none."""
    numbers = read_numbers(run_dir / AUDIT)
    if numbers is None:
        return {}
    page = f"{AUDIT}/{PAGE}"
    return {"page": page, "rows": drawn_rows(numbers), "lines": safety_lines(numbers)}


def people_rows(metrics: Sequence[Json]) -> list[Json]:
    """What people judged, one row for each iteration in which they were asked."""
    return [
        {"iteration": line.get("iteration")} | {name: line.get(f"people/{name}") for name in PEOPLE}
        for line in metrics
        if line.get("phase") == "pair" and line.get("people/asked")
    ]
