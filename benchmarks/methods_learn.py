"""Does every method learn correctness? Each recipe of scenes from the shipped base, one after another, one table.

    .venv/bin/python benchmarks/methods_learn.py                 # every recipe below, a few CPU minutes each
    .venv/bin/python benchmarks/methods_learn.py ddpo rwr        # some; the rows of the others stay

A recipe runs in runs/methods_learn/<name>; a finished run is read, an unfinished one resumed, so the script
can be stopped and started at will. `--fresh` runs the named recipes anew (for another base). Each row is the
share of held-out prompts drawn entirely right by the base and by the last iterate, from the same noise and
judged by the checker that nothing was trained on, the change with its 95% interval over prompts, how many
prompts were repaired and how many broken, processor minutes of the whole command (loading, evaluations and
report included) and network evaluations. Written to benchmarks/results/methods_learn.json after each
recipe; the Markdown table is printed. `--docs` puts it, and each recipe's figures, between their marks in the
pages under docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import load_run

ROOT = Path(__file__).resolve().parent.parent
METHODS = (
    "quick", "distil", "expo", "expo_two_agents", "expo_lora", "expo_denoising", "dpo_offline", "expo_implicit", "dpo_online",
    "mapo", "orpo", "spin", "improvement_dpo", "diffusion_kto", "sft", "raft", "rwr", "awm", "dgpo", "diffusion_nft", "ddpo",
    "dpok", "d3po", "spo", "prdp",
)  # fmt: skip
OTHERS = {"expo_implicit": ("rewards.0.path", "dpo_offline")}
"""Setting of a recipe that names the finished run of another one."""
JUDGE = "correct"
INTERRUPTED = 75
"""Exit code of a run that was stopped and can be resumed."""
MARKED = re.compile(r"<!-- begin: methods_learn ?(\w*) -->\n.*?<!-- end -->", re.DOTALL)
"""Where a page has a recipe's figures; without a name, the table."""

Row = dict[str, Any]


def child_seconds() -> float:
    """Processor seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_recipe(name: str, runs: Path, settings: list[str]) -> int:
    """Run the recipe, or what is left of it, and return the exit code; its processor seconds add up in a file
    beside the run."""
    folder, clock = runs / name, runs / f"{name}.cpu_seconds"
    if name in OTHERS:
        key, other = OTHERS[name]
        settings = [f"{key}={runs / other}", *settings]
    command = [sys.executable, "-m", "diffexpo", "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [f"scenes/{name}", "--out", str(folder)]
        command += [part for setting in settings for part in ("--set", setting)]
    before = child_seconds()
    code = subprocess.run(command, check=False).returncode
    earlier = float(clock.read_text()) if clock.exists() else 0.0
    runs.mkdir(parents=True, exist_ok=True)
    clock.write_text(str(earlier + child_seconds() - before))
    return code


def is_finished(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def read_row(name: str, runs: Path) -> Row:
    """The row of a finished run."""
    run = load_run(runs / name)
    base, last = run.suites["base"], run.suites[f"iteration-{run.iterations[-1]}"]
    rows = base.scored
    before, after = base.scores[JUDGE][rows], last.scores[JUDGE][rows]
    change, low, high = bootstrap_mean(after - before, np.array(base.prompt_ids())[rows])
    evaluations = sum(line.get("cost/network_evaluations") or 0 for line in run.metrics)
    return {
        "prompts": int(rows.sum()),
        "base": float(before.mean()),
        "after": float(after.mean()),
        "change": {"mean": change, "low": low, "high": high},
        "repaired": int((after > before).sum()),
        "broken": int((after < before).sum()),
        "cpu_minutes": float((runs / f"{name}.cpu_seconds").read_text()) / 60,
        "network_evaluations": int(evaluations),
    }


def table(rows: dict[str, Row]) -> str:
    """Markdown, one line a recipe in the order of METHODS."""
    head = "recipe | base | after | change [95%] | repaired, broken | CPU minutes | network evaluations"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name in sorted(rows, key=(*METHODS, *rows).index):
        row = rows[name]
        lines.append(
            f"| `scenes/{name}` | {100 * row['base']:.1f}% | {100 * row['after']:.1f}% | {change_of(row)} "
            f"| {row['repaired']}, {row['broken']} | {row['cpu_minutes']:.1f} | {row['network_evaluations']:,} |"
        )
    return "\n".join(lines)


def change_of(row: Row) -> str:
    mean, low, high = (100 * row["change"][key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def sentence(row: Row) -> str:
    """A recipe's figures for the page of its method."""
    return (
        f"Of {row['prompts']} held-out prompts the base draws {100 * row['base']:.1f}% entirely right, the last "
        f"iterate {100 * row['after']:.1f}%: {change_of(row)} points, {row['repaired']} repaired and "
        f"{row['broken']} broken, in {row['cpu_minutes']:.1f} CPU minutes and {row['network_evaluations']:,} "
        "network evaluations; one seed ([all methods](../results_scenes.md))."
    )


def write_docs(rows: dict[str, Row]) -> None:
    """The figures, between their marks; a mark whose recipe has no row stays as it is."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name and name not in rows:
            return found[0]
        mark = found[0].partition("\n")[0]
        return f"{mark}\n{sentence(rows[name]) if name else table(rows)}\n<!-- end -->"

    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if (filled := MARKED.sub(fill, text)) != text:
            page.write_text(filled, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"recipes under scenes/ (default: {', '.join(METHODS)})")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods_learn"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs of the named recipes")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what there is")
    parser.add_argument("--docs", action="store_true", help="put table and figures into the pages of docs/")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "methods_learn.json")
    options = parser.parse_args()
    known: dict[str, Row] = json.loads(options.out.read_text())["recipes"] if options.out.exists() else {}
    failed: list[str] = []
    for name in () if options.table else (options.names or METHODS):
        if options.fresh:
            shutil.rmtree(options.runs / name, ignore_errors=True)
            (options.runs / f"{name}.cpu_seconds").unlink(missing_ok=True)
        done = is_finished(options.runs / name)
        code = 0 if done else run_recipe(name, options.runs, options.settings)
        if code:
            failed.append(name)
            if code == INTERRUPTED:
                break
            continue
        known[name] = read_row(name, options.runs)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "settings": options.settings,
            "recipes": known,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(known))
    if options.docs:
        write_docs(known)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
