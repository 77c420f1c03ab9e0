"""Run folders: which is meant, which is new, which is finished."""

from __future__ import annotations

import difflib
from itertools import chain, count
from pathlib import Path

from diffexpo.assembly import MissingError
from diffexpo.bounded.texts import read_json

RUNS = Path("runs")
ACTIVITY = ("config.yaml", "status.json", "metrics.jsonl")


def find_run(name: str | None) -> Path:
    """An existing run: a folder, the name of one below `runs`, or the most recently active if none is named.
    A MissingError gives the nearest names."""
    runs = list_runs(RUNS)
    if name is None:
        if not runs:
            raise MissingError(f"no run folder in {RUNS}/: start one with `diffexpo run emoji/expo`")
        return runs[-1]
    for path in (Path(name), RUNS / name):
        if (path / "config.yaml").is_file():
            return path
    near = difflib.get_close_matches(name, [run.name for run in runs], n=3, cutoff=0.5)
    known = ", ".join(run.name for run in runs[-5:])
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Runs in {RUNS}/: {known or 'none'}."
    raise MissingError(f"no run {name!r}: neither a run folder (with config.yaml) nor one in {RUNS}/. {hint}")


def list_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, the most recently active last."""

    def last_active(run: Path) -> float:
        return max((run / file).stat().st_mtime for file in ACTIVITY if (run / file).exists())

    return sorted((path.parent for path in folder.glob("*/config.yaml")), key=last_active)


def free_folder(name: str) -> Path:
    """`runs/name`, or that name with the next free number (`expo-2`)."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(RUNS / free for free in names if not (RUNS / free).exists())


def is_finished(run_dir: Path) -> bool:
    """Whether a run has ended and still has what it ended with: its report and its export."""
    has_export = next((run_dir / "export").glob("*"), None) is not None
    return run_state(run_dir) == "finished" and (run_dir / "report.html").is_file() and has_export


def run_state(run_dir: Path) -> str:
    """`state` of status.json (running, interrupted, failed, finished), or "unknown"."""
    try:
        return str(read_json(run_dir / "status.json")["state"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "unknown"
