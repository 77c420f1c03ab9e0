"""The main claim: EXPO improves the base on held-out prompts under a judge it never saw, for each of several
seeds.

    .venv/bin/python benchmarks/seeds.py --seeds 0 1 2

Runs the recipe once a seed (or takes the finished run folders under --runs), then writes one table: win rate
of the last iterate against the base and of offline Diffusion-DPO at the same number of network evaluations,
both with 95% intervals clustered by prompt, Vendi scores, KL to the base, minutes. Written to
benchmarks/results/seeds.json and printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from diffexpo.evaluation.metrics import bootstrap_mean, win_rate
from diffexpo.evaluation.records import SuiteResult, load_run


def run_seed(recipe: str, seed: int, folder: Path, extra: list[str]) -> None:
    """Run or resume one seed."""
    command = [sys.executable, "-m", "diffexpo", "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [recipe, "--set", f"seed={seed}", "--out", str(folder), *extra]
    subprocess.run(command, check=True)


def compare(new: SuiteResult, old: SuiteResult, judge: str) -> dict[str, float]:
    """Win rate of new over old on the same prompts and noise."""
    rows = new.scored
    prompts = [prompt for prompt, scored in zip(new.prompt_ids(), rows, strict=True) if scored]
    result = win_rate(new.scores[judge][rows], old.scores[judge][rows], prompts=prompts)
    return {"rate": result.rate, "low": result.low, "high": result.high}


def vendi(suite: SuiteResult) -> float:
    return float(np.mean(list(suite.vendi.values()))) if suite.vendi else float("nan")


def read_seed(folder: Path, seed: int) -> dict[str, object]:
    """The numbers of one finished run."""
    run = load_run(folder)
    base, last = run.suites["base"], run.suites[f"iteration-{run.iterations[-1]}"]
    judge = next(name for name, role in base.roles.items() if role == "heldout")
    train = next(name for name, role in base.roles.items() if role == "train")
    rows = base.scored
    gain = bootstrap_mean(
        last.scores[judge][rows] - base.scores[judge][rows], np.array(base.prompt_ids())[rows]
    )
    result: dict[str, object] = {
        "seed": seed,
        "prompts": len(base.prompts),
        "expo_vs_base": compare(last, base, judge),
        "heldout_gain": gain,
        "train_judge_vs_base": compare(last, base, train),
        "vendi_base": vendi(base),
        "vendi_expo": vendi(last),
        "kl_expo": float(np.mean(last.kl)) if last.kl else float("nan"),
        "network_evaluations": int(sum(line.get("cost/network_evaluations") or 0 for line in run.metrics)),
        "minutes": sum(
            value or 0 for line in run.metrics for name, value in line.items() if name.startswith("time/")
        )
        / 60,
    }
    for version, suite in run.suites.items():
        if version.startswith("iteration-"):
            result[f"{version}_vs_base"] = compare(suite, base, judge)
    if "baseline" in run.suites:
        offline = run.suites["baseline"]
        result |= {
            "offline_dpo_vs_base": compare(offline, base, judge),
            "expo_vs_offline_dpo": compare(last, offline, judge),
            "vendi_offline_dpo": vendi(offline),
            "kl_offline_dpo": float(np.mean(offline.kl)) if offline.kl else float("nan"),
        }
    return result


def table(rows: list[dict[str, object]]) -> str:
    """Markdown, one line a seed."""

    def rate(cell: dict[str, float] | None) -> str:
        return (
            "-"
            if cell is None
            else f"{100 * cell['rate']:.1f}% [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
        )

    lines = [
        (
            "| seed | EXPO vs base | offline DPO vs base | EXPO vs offline DPO | Vendi base / EXPO / DPO | KL "
            "EXPO / DPO (nats) |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {rate(row['expo_vs_base'])} | {rate(row.get('offline_dpo_vs_base'))} "
            f"| {rate(row.get('expo_vs_offline_dpo'))} "
            f"| {row['vendi_base']:.2f} / {row['vendi_expo']:.2f} / "
            f"{row.get('vendi_offline_dpo', float('nan')):.2f} "
            f"| {row['kl_expo']:.2f} / {row.get('kl_offline_dpo', float('nan')):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="emoji/expo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seeds.json")
    options = parser.parse_args()
    extra = [part for setting in options.settings for part in ("--set", setting)]
    rows = []
    for seed in options.seeds:
        folder = options.runs / f"seed-{seed}"
        run_seed(options.recipe, seed, folder, extra)
        rows.append(read_seed(folder, seed))
    result = {
        "recipe": options.recipe,
        "settings": options.settings,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seeds": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    improved = sum(row["expo_vs_base"]["low"] > 0.5 for row in rows)
    print(f"\nthe 95% interval lies above 50% for {improved} of {len(rows)} seeds")


if __name__ == "__main__":
    main()
