"""What a run came to, in a few lines for a person and as `summary.json` for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffexpo
from diffexpo.evaluation.contenders import finite
from diffexpo.evaluation.metrics import WinRate
from diffexpo.evaluation.records import Json, RunRecord
from diffexpo.evaluation.summary import Estimate, Summary
from diffexpo.evaluation.verdict import give_verdict

FORMAT = 1
FILE = "summary.json"


def headline(record: RunRecord, summary: Summary) -> Json:
    """Every headline number of a run, with 95% intervals as [mean, low, high]; what was not measured is null
    or left out. `format` grows when a name changes its meaning."""
    config, verdict = record.config, give_verdict(summary)
    model, algorithm = config.get("model", {}), config.get("algorithm", {})
    found: Json = {
        "format": FORMAT,
        "diffexpo": diffexpo.__version__,
        "name": config.get("name"),
        "seed": config.get("seed"),
        "method": algorithm.get("type"),
        "model": model.get("path"),
        "tuning": config.get("tuning", {}).get("kind"),
        "state": record.status.get("state"),
        "is_finished": summary.is_finished,
        "verdict": {"kind": verdict.kind, "title": verdict.title},
        "result": summary.final,
        "planned_iterations": summary.planned_iterations,
        "judge": summary.judge,
        "win_rate": {name: _win(win) for name, win in summary.wins.items()},
        "against_offline_dpo": None if summary.against_baseline is None else _win(summary.against_baseline),
        "scores": summary.rewards,
        "gains": summary.gains,
        "entirely_right": _shares(summary),
        "kl": summary.kl,
        "vendi": summary.vendi,
        "vendi_change": summary.vendi_change,
        "cost": {
            "training_evaluations": summary.method_cost,
            "seconds": {row.phase: row.seconds for row in summary.costs},
        },
        "alarms": [
            {"name": one.name, "severity": one.severity, "message": one.message} for one in summary.alarms
        ],
    }
    plain: Json = finite(found)
    return plain


def _win(win: WinRate) -> Json:
    counts = {"wins": win.wins, "ties": win.ties, "losses": win.losses, "prompts": win.num_prompts}
    return {"rate": list(win.interval), "p_value": win.p_value, "verdict": win.verdict} | counts


def _shares(summary: Summary) -> Json | None:
    if not summary.shares:
        return None
    row = summary.shares[0]
    shares: Mapping[str, Any] = dict(row.shares)
    change: Estimate = row.change
    return {
        "judge": summary.share_judge,
        "share": shares,
        "change": list(change),
        "repaired": row.repaired,
        "broken": row.broken,
    }


def closing_lines(run_dir: Path, summary: Summary) -> list[str]:
    """What a finished run says last: the verdict with its numbers, alarms, what to open, how to use it. What
    to do about alarms is said once, however many of them ask for it."""
    verdict = give_verdict(summary)
    alarms = [one for one in summary.alarms if one.severity != "note"]
    advice = dict.fromkeys(one.what_to_do for one in alarms)
    export = run_dir / "export"
    use = f"use it: the Python code in {export / 'README.md'} loads {export} in plain diffusers"
    return [
        f"{verdict.title}.",
        *(f"  {sentence}" for sentence in verdict.sentences),
        *(f"alarm, {one.severity}: {one.message}" for one in alarms),
        *(f"  what to do: {text}" for text in advice),
        *([use] if export.is_dir() else []),
        f"compare: diffexpo runs | another iterate: diffexpo export {run_dir} --iteration N",
    ]
