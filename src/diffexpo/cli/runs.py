"""`diffexpo runs`: the runs of a folder, one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diffexpo.assembly import ConfigError, MissingError
from diffexpo.bounded.texts import read_json
from diffexpo.bounded.yaml_texts import read_settings
from diffexpo.cli.folders import RUNS, list_runs, run_state
from diffexpo.cli.options import AsJson
from diffexpo.cli.progress import Console


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of run folders.")] = RUNS,
    as_json: AsJson = False,
) -> None:
    """List the runs, the newest last: state, method, what it came to and with what interval."""
    if not folder.is_dir():
        raise MissingError(f"there is no folder {folder}: start a run, or name the folder that holds some")
    found = [describe_run(run) for run in list_runs(folder)]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(interactive=False)
    columns = ["run", "state", "method", "seed", "result", "win rate vs base", "alarms"]
    rows = [[run[name] for name in ("run", "state", "method", "seed")] + _told(run) for run in found]
    console.table(f"runs in {folder}", columns, rows)


def describe_run(run_dir: Path) -> dict[str, Any]:
    """What a run's summary.json holds, or its settings where there is none yet, with its folder and its state
    of now."""
    path = run_dir / "summary.json"
    try:
        found = read_json(path) if path.is_file() else _from_settings(run_dir)
    except ValueError:
        found = _from_settings(run_dir)
    return {"run": run_dir.name, "folder": str(run_dir)} | found | {"state": run_state(run_dir)}


def _from_settings(run_dir: Path) -> dict[str, Any]:
    try:
        config = read_settings(run_dir / "config.yaml")
    except ConfigError:  # one damaged run does not hide the others
        return {}
    return {
        "name": config.get("name"),
        "seed": config.get("seed"),
        "method": config.get("algorithm", {}).get("type"),
        "model": config.get("model", {}).get("path"),
    }


def _told(run: dict[str, Any]) -> list[str]:
    """Result, win rate and number of alarms of a run in words; "-" where they are not known."""
    result = run.get("result")
    win = (run.get("win_rate") or {}).get(result)
    rate = "-"
    if win is not None:
        share, low, high = win["rate"]
        rate = f"{share:.1%} ({low:.1%} to {high:.1%})"
    alarms = [alarm for alarm in run.get("alarms", []) if alarm["severity"] != "note"]
    return [result or "-", rate, str(len(alarms)) if "alarms" in run else "-"]
