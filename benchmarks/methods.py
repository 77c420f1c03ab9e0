"""Every method under one protocol: its recipe from the shipped base, one table, one learning curve each.

    .venv/bin/python benchmarks/methods.py                  # all recipes of METHODS, about an hour of one
    core .venv/bin/python benchmarks/methods.py ddpo rwr         # some of them; the others' rows stay

Each recipe runs in runs/methods/<name> (finished runs are read, others resumed, so it can be stopped and
started at will). Reported are the change of the method's own reward on the prompts it draws (last collection
against the first, where both have the same prompts) and on held-out prompts, that of the held-out judge there
(each with a 95% interval, bootstrap clustered by prompt), the win rate under the held-out judge, Vendi score,
KL to the base, network evaluations, wall time and peak memory. Written to benchmarks/results/methods.json,
docs/methods.md's table is printed, and the curves are drawn to docs/images/methods/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from diffexpo.data.store import Store
from diffexpo.evaluation.metrics import bootstrap_mean, win_rate
from diffexpo.evaluation.records import RunRecord, SuiteResult, load_run

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
METHODS = (
    "sft", "raft", "dpo_offline", "dpo_online", "diffusion_kto", "mapo", "orpo", "spin", "rwr", "diffusion_nft", "awm", "dgpo", "expo",
    "ddpo", "ddpo_compressibility", "dpok", "d3po", "spo", "spo_compressibility", "prdp", "flow_grpo", "expo_flow",
)  # fmt: skip
EVALUATION = ("evaluation.every_iteration=false", "baseline.offline_dpo=false")


@dataclass(frozen=True)
class Scored:
    """What is read of a collected sample."""

    prompt: str
    rewards: dict[str, float]


def run_recipe(name: str, folder: Path, settings: list[str]) -> None:
    """Run the recipe, or what is left of it."""
    command = [sys.executable, "-m", "diffexpo", "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [f"emoji/{name}", "--out", str(folder)]
        command += [part for setting in (*EVALUATION, *settings) for part in ("--set", setting)]
    subprocess.run(command, check=True)


def is_finished(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def own_reward(run: RunRecord) -> str:
    """Name of the reward that the run is meant to raise: its first training reward, or, without one, what it
    watches."""
    rewards = run.config["rewards"]
    return str(next((r for r in rewards if r["role"] == "train"), rewards[0])["name"])


def gain(new: SuiteResult, old: SuiteResult, scorer: str) -> dict[str, float]:
    """Mean paired difference on the same prompts and noise, and its interval."""
    rows = old.scored
    prompts = np.array(old.prompt_ids())[rows]
    mean, low, high = bootstrap_mean(new.scores[scorer][rows] - old.scores[scorer][rows], prompts)
    return {"mean": mean, "low": low, "high": high}


def total(run: RunRecord, prefix: str, until: int | None = None) -> float:
    """Sum of the amounts of a name spent up to an iteration."""
    lines = (line for line in run.metrics if until is None or int(line["iteration"]) <= until)
    return float(sum(value or 0 for line in lines for name, value in line.items() if name.startswith(prefix)))


def drawn_curve(run: RunRecord, own: str) -> list[dict[str, float]]:
    """Change of the mean reward of each collection against the first, by network evaluations spent before it.

    Paired by prompt; empty where the collections draw different prompts.
    """
    store = Store(run.run_dir / "store")
    means: list[dict[str, float]] = []
    spent: list[float] = []
    for number in (k for stage, k in store.completed() if stage == "collect"):
        by_prompt: dict[str, list[float]] = {}
        for row in store.samples(number, view=Scored):
            by_prompt.setdefault(row.prompt, []).append(row.rewards[own])
        means.append({prompt: float(np.nanmean(values)) for prompt, values in by_prompt.items()})
        spent.append(
            total(run, "cost/network_evaluations", number) - total_of(run, number, from_collect=True)
        )
    if len(means) < 2 or any(set(later) != set(means[0]) for later in means):
        return []
    prompts = sorted(means[0])
    curve = []
    for evaluations, later in zip(spent, means, strict=True):
        mean, low, high = bootstrap_mean([later[prompt] - means[0][prompt] for prompt in prompts], prompts)
        curve.append({"evaluations": evaluations, "mean": mean, "low": low, "high": high})
    return curve


def read_method(folder: Path) -> dict[str, object]:
    """The row of one finished run."""
    run = load_run(folder)
    base, last = run.suites["base"], run.suites[f"iteration-{run.iterations[-1]}"]
    own = own_reward(run)
    judge = next(name for name, role in base.roles.items() if role == "heldout")
    rows = base.scored
    won = win_rate(
        last.scores[judge][rows], base.scores[judge][rows], prompts=list(np.array(base.prompt_ids())[rows])
    )
    curve = [{"evaluations": 0.0, "mean": 0.0, "low": 0.0, "high": 0.0}]
    for number in run.iterations:
        spent = total(run, "cost/network_evaluations", number)
        spent -= total_of(run, number, after_training=True)
        curve.append({"evaluations": spent, **gain(run.suites[f"iteration-{number}"], base, own)})
    peak = max(float(line.get("mem/peak_gib") or 0) for line in run.metrics)
    return {
        "algorithm": run.config["algorithm"]["type"],
        "model": run.config["model"]["path"],
        "own_reward": own,
        "own_base": float(base.scores[own][rows].mean()),
        "own_gain": gain(last, base, own),
        "drawn_curve": drawn_curve(run, own),
        "heldout_gain": gain(last, base, judge),
        "heldout_wins": {"rate": won.rate, "low": won.low, "high": won.high},
        "vendi": [mean_vendi(base), mean_vendi(last)],
        "kl": float(np.mean(last.kl)) if last.kl else float("nan"),
        "network_evaluations": total(run, "cost/network_evaluations"),
        "reward_queries": total(run, "rollout/images"),
        "seconds": total(run, "time/collect_s") + total(run, "time/train_s"),
        "peak_gib": peak,
        "prompts": len(base.prompts),
        "curve": curve,
    }


def total_of(
    run: RunRecord, iteration: int, *, from_collect: bool = False, after_training: bool = False
) -> float:
    """Network evaluations of an iteration from its collection on, or after its training.

    The loop of trajectories collects before it trains, the other one after.
    """
    lines = [line for line in run.metrics if line["iteration"] == iteration]
    phases = [line["phase"] for line in lines]
    start = phases.index("collect") if from_collect else phases.index("train_summary") + 1
    assert from_collect or after_training
    return float(sum(line.get("cost/network_evaluations") or 0 for line in lines[start:]))


def mean_vendi(suite: SuiteResult) -> float:
    return float(np.mean(list(suite.vendi.values()))) if suite.vendi else float("nan")


def table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown, one line a method."""
    lines = [
        (
            "| recipe | its reward on the prompts it draws: change [95%] | its reward, held-out prompts: "
            "base, change [95%] "
            "| held-out judge, held-out prompts: change [95%] | wins against base [95%] | Vendi base, after "
            "| KL, nats | images scored "
            "| network evaluations | collect and train | peak memory |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in METHODS if name in rows):
        row = rows[name]
        own, judge, wins = row["own_gain"], row["heldout_gain"], row["heldout_wins"]
        before, after = row["vendi"]
        drawn = row["drawn_curve"][-1] if row["drawn_curve"] else None
        shown = "-" if drawn is None else f"{drawn['mean']:+.3f} [{drawn['low']:+.3f}, {drawn['high']:+.3f}]"
        lines.append(
            f"| `{name}` | {shown} | {row['own_base']:.2f}, {own['mean']:+.3f} [{own['low']:+.3f}, "
            f"{own['high']:+.3f}] "
            f"| {judge['mean']:+.3f} [{judge['low']:+.3f}, {judge['high']:+.3f}] "
            f"| {100 * wins['rate']:.1f}% [{100 * wins['low']:.1f}, {100 * wins['high']:.1f}] | "
            f"{before:.2f}, {after:.2f} "
            f"| {row['kl']:.2f} | {row['reward_queries']:,.0f} | {row['network_evaluations']:,.0f} "
            f"| {row['seconds'] / 60:.1f} min | {row['peak_gib']:.2f} GiB |"
        )
    return "\n".join(lines)


def draw_curve(name: str, row: dict[str, object], path: Path) -> None:
    """Change of the method's own reward against network evaluations spent, on drawn and on held-out
    prompts."""
    figure, axes = pyplot.subplots(figsize=(4.8, 3.0), layout="constrained")
    axes.axhline(0.0, color="0.7", linewidth=0.8)
    curves = {"prompts it draws": row["drawn_curve"], f"{row['prompts']} held-out prompts": row["curve"]}
    for number, (label, curve) in enumerate(curves.items()):
        if not curve:
            continue
        x, color = [point["evaluations"] for point in curve], f"C{number}"
        axes.fill_between(
            x, [p["low"] for p in curve], [p["high"] for p in curve], color=color, alpha=0.15, lw=0
        )
        axes.plot(x, [p["mean"] for p in curve], "o-", color=color, markersize=3.5, label=label)
    axes.set_xlabel("network evaluations")
    axes.set_ylabel(f"{row['own_reward']}: change")
    axes.set_title(f"emoji/{name}, 95% intervals", fontsize=9)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"recipes under emoji/ (default: {', '.join(METHODS)})")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images" / "methods")
    options = parser.parse_args()
    known = json.loads(options.out.read_text())["methods"] if options.out.exists() else {}
    for name in options.names or METHODS:
        folder = options.runs / name
        if not is_finished(folder):
            run_recipe(name, folder, options.settings)
        known[name] = read_method(folder)
        draw_curve(name, known[name], options.images / f"{name}.png")
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "settings": [*EVALUATION, *options.settings],
            "methods": known,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
