"""`diffexpo compare` and `diffexpo sweep`: runs beside each other, and the product of settings as runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.failures import boundary
from diffexpo.cli.folders import RUNS, find_run
from diffexpo.cli.options import AsJson
from diffexpo.cli.processes import is_started_by_a_launcher
from diffexpo.cli.progress import Console, Nowhere
from diffexpo.cli.run import deadline

if TYPE_CHECKING:
    from diffexpo.assembly import RunComparison

COMPARISON = RUNS / "comparison"
SIZES = (50, 100, 200, 500, 1000, 2000)


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Run folders or names, or folders of runs, such as a sweep's."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the page and its data.")
    ] = COMPARISON,
    judge: Annotated[
        str | None, typer.Option(metavar="NAME", help="Judge that decides; default: the first they share.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print how many prompts show which difference; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put runs beside each other: settings that differ, curves, seeds joined, cost, who beats whom.

    Runs that differ in their seed alone become one row. Writes comparison.html, .md, .csv and .json.

    \b
    diffexpo compare expo dpo_offline             two runs of runs/
    diffexpo compare runs/expo-sweep              all runs of a sweep
    diffexpo compare expo expo-2 --plan           what a further evaluation could see
    """
    folders = [folder for run in runs or () for folder in _runs_of(run)]
    if not folders:
        raise ConfigError("no run named: expected run folders or names (diffexpo runs lists them)")
    found = assembly.compare_runs(list(dict.fromkeys(folders)), judge=judge)
    console = Console(interactive=False)
    if plan:
        _print_plan(found, console, as_json)
        return
    paths = assembly.write_comparison(found, out)
    if as_json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
        return
    _print_results(found, console)
    console.line(f"page: {paths[0]} (with {', '.join(path.name for path in paths[1:])})")


# Many parameters because each is an option of the command.
def sweep(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE...", help="Embedded recipes or YAML files, merged left to right."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE,...", help="A setting with its values, e.g. seed=0,1,2. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the runs; default: runs/NAME-sweep."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at once.")] = 1,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Stop after this long, saved and resumable (exit code 75).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all settings, list the runs, do nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run every combination of some settings, then compare them on one page.

    The same command continues a sweep that was stopped; finished runs stay, so values can be added.

    \b
    diffexpo sweep scenes/expo --set seed=0,1,2 --set algorithm.beta=150,300 --dry-run
    diffexpo sweep scenes/expo --set seed=0,1,2 --processes 2
    """
    if is_started_by_a_launcher():
        raise ConfigError("a sweep starts processes of its own; run it without torchrun")
    from diffexpo.config.product import load_product

    combinations = load_product(recipes or [], overrides or [])
    folder = out or RUNS / f"{combinations[0].recipe}-sweep"
    planned = assembly.plan_sweep(recipes or [], combinations, folder)
    console = Console(Nowhere() if as_json else None)
    rows = [[run.name, run.state, run.evaluations] for run in planned.runs]
    columns = ["run", "state", "network evaluations"]
    console.table(f"sweep in {planned.folder}", columns, rows)
    if dry_run:
        if as_json:
            runs = [dict(zip(columns, row, strict=True)) for row in rows]
            print(json.dumps({"folder": str(planned.folder), "runs": runs}, indent=1))
        console.line(
            f"nothing was run (--dry-run): {len(rows)} runs, {sum(row[2] for row in rows):,} evaluations"
        )
        return
    with boundary(), deadline(max_minutes):
        paths = assembly.run_sweep(planned, console, processes=processes, is_quiet=as_json)
        console.line(f"page: {paths[0]}" if paths else "no run was evaluated, so there is no page")
        if as_json:
            print(paths[-1].read_text(encoding="utf-8") if paths else "{}")


def _runs_of(name: str) -> list[Path]:
    """The run that is meant, or every run in a folder of runs, by name."""
    for path in (Path(name), RUNS / name):
        if not (path / "config.yaml").is_file() and (inside := sorted(path.glob("*/config.yaml"))):
            return [file.parent for file in inside]
    return [find_run(name)]


def _print_results(found: RunComparison, console: Console) -> None:
    rows = []
    for group in found.groups:
        point = group.result
        cells = (
            ["-", "-", "-"]
            if point is None
            else [
                _told(point.score, is_share=found.is_share),
                _told(point.gain),
                _told(point.rate, is_share=True),
            ]
        )
        rows.append([group.label, len(group.runs), *cells])
    columns = ["runs", "seeds", f"mean {found.judge}", "gain on the base", "win rate vs base"]
    console.table(f"under the judge {found.judge}, 95% intervals", columns, rows)
    for one in found.comparisons:
        if one.verdict != "undecided":
            gap = _told(one.difference)
            console.line(f"{one.first} is {one.verdict} than {one.second}: {gap}, p {one.p_holm:.2g} (Holm)")
    for problem in found.problems:
        console.warning(problem)


def _print_plan(found: RunComparison, console: Console, as_json: bool) -> None:
    """The smallest difference that four of five comparisons find, by couple and number of prompts."""
    rows = []
    for one, power in zip(found.comparisons, found.power, strict=True):
        if power is not None:
            visible = [power.detectable_with(size) for size in SIZES]
            rows.append([f"{one.first} / {one.second}", one.difference[0], power.needed or "-", *visible])
    columns = ["couple", "measured", "prompts for it", *(f"{size} prompts see" for size in SIZES)]
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
        return
    console.table(f"differences of {found.judge} that four of five comparisons find", columns, rows)


def _told(estimate: tuple[float, float, float] | None, *, is_share: bool = False) -> str:
    """A mean with its interval; that of a share ends at 0 and 1."""
    if estimate is None:
        return "-"
    mean, low, high = estimate
    if is_share and not math.isnan(low):
        low, high = max(low, 0.0), min(high, 1.0)
    ends = "" if math.isnan(low) else f" [{low:.4g}, {high:.4g}]"
    return f"{mean:.4g}{ends}"
