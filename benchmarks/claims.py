"""The papers' claims, each as a comparison of two arms over prompts and seeds, and a verdict.

    .venv/bin/python benchmarks/claims.py plan                       # what would run, what it costs, what it can see
    .venv/bin/python benchmarks/claims.py search                     # learning rates, on prompts and a seed of their own
    .venv/bin/python benchmarks/claims.py run --seeds 0 1 2          # every arm; stop it and start it again at will
    .venv/bin/python benchmarks/claims.py run --arms expo offline    # some of them
    .venv/bin/python benchmarks/claims.py verdicts --docs            # compare what is finished; fill docs/claims.md

Arms and claims stand in claims_list.py. An arm runs in runs/claims/<arm>-<seed>; a finished run is read, an
unfinished one resumed. Claims are judged on 500 held-out prompts by a checker that nothing was trained on, both
arms from the same noise; intervals are over prompts and seeds (crossed clusters), p-values are corrected for
the number of claims (Holm). A claim *holds* or *does not hold* where its whole interval is on one side of 0, and is
*undecided* else; then the table says how many prompts would decide a difference as large as the one seen.

Each arm's learning rate is the best of its recipe's times 1/2, 1 and 2 on 150 validation prompts and a seed
that no table uses: the same small search for all. Written to benchmarks/results/claims.json with the commit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from claims_list import ARMS, CLAIMS, CORE, Arm, Claim
from methods_learn import INTERRUPTED, child_seconds, is_finished

from diffexpo.config.load import load_config
from diffexpo.evaluation.planning import Spread, detectable_difference, measured_spread, num_prompts_needed
from diffexpo.evaluation.records import SuiteResult, load_run, load_suite
from diffexpo.evaluation.statistics import compare_models
from diffexpo.online.cost import run_cost

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims.json"
PAGE = ROOT / "docs" / "claims.md"
BEGIN, END = "<!-- begin: claims -->", "<!-- end -->"
PROMPTS, SEARCH_PROMPTS, SEARCH_SEED = 500, 150, 1000
GUESSED = Spread(between=0.1, within=0.2)
"""Of the difference of two arms, where none is finished: three prompts in ten change."""
Json = dict[str, Any]
Scores = dict[tuple[Any, Any, Any], float]


def settings_of(name: str, runs: Path, seed: int, rate: float | None = None) -> list[str]:
    """The arm's settings, with the folders of the runs that it needs."""
    arm = ARMS[name]
    folders = {needed: str(runs / f"{needed}-{seed}") for needed in arm.needs}
    settings = [setting.format_map(folders) if arm.needs else setting for setting in arm.settings]
    if arm.equals is not None:
        settings.append(equal_cost(arm, settings, runs, seed))
    if rate is not None:
        settings.append(f"training.learning_rate={rate:.8g}")
    return [*CORE, *settings, f"seed={seed}"]


def equal_cost(arm: Arm, settings: list[str], runs: Path, seed: int) -> str:
    """The setting with which the arm takes about as many network evaluations as the one it equals."""
    other = str(arm.equals)
    goal = cost_of(ARMS[other], settings_of(other, runs, seed))
    one, two = (cost_of(arm, [*CORE, *settings, f"{arm.grows}={number}"]) for number in (2, 3))
    return f"{arm.grows}={max(2, 2 + round((goal - one) / (two - one)))}"


def cost_of(arm: Arm, settings: list[str]) -> int:
    """Network evaluations of drawing and training."""
    return run_cost(load_config([arm.recipe], settings, {}).config).total


def run_arm(arm: Arm, folder: Path, settings: list[str]) -> int:
    """Run the arm, or what is left of it; its processor seconds add up in a file beside the run."""
    clock = folder.with_name(f"{folder.name}.cpu_seconds")
    command = [sys.executable, "-m", "diffexpo", "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [
            arm.recipe,
            "--out",
            str(folder),
            *(part for each in settings for part in ("--set", each)),
        ]
    before = child_seconds()
    code = subprocess.run(command, check=False).returncode
    earlier = float(clock.read_text()) if clock.exists() else 0.0
    clock.write_text(str(earlier + child_seconds() - before))
    return code


def finish(name: str, runs: Path, seed: int, rates: dict[str, float]) -> int:
    """Bring the arm, and what it needs, to its end; the exit code of what fails, or 0."""
    folder = runs / f"{name}-{seed}"
    if is_finished(folder):
        return 0
    for needed in ARMS[name].needs:
        if code := finish(needed, runs, seed, rates):
            return code
    return run_arm(ARMS[name], folder, settings_of(name, runs, seed, rates.get(name)))


def search(names: list[str], runs: Path, known: Json) -> int:
    """Choose each arm's learning rate on validation prompts; the exit code of what was interrupted, or 0."""
    on_validation = ["evaluation.prompts=scenes:validation", f"evaluation.num_prompts={SEARCH_PROMPTS}"]
    for name in names:
        arm, found = ARMS[name], {}
        for needed in arm.needs:
            if code := finish(needed, runs, SEARCH_SEED, known["rates"]):
                return code
        settings = [*settings_of(name, runs, SEARCH_SEED), *on_validation, "evaluation.every_iteration=false"]
        middle = load_config([arm.recipe], settings, {}).config.training.learning_rate
        for factor in arm.multiplies if len(arm.multiplies) > 1 else ():
            folder = runs / "search" / f"{name}-{factor:g}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            rate = factor * middle
            if not is_finished(folder) and (
                code := run_arm(arm, folder, [*settings, f"training.learning_rate={rate:.8g}"])
            ):
                if code == INTERRUPTED:
                    return code
                continue
            found[rate] = float(last_suite(folder).scores["correct"].mean())
        if found:
            known["rates"][name] = max(found, key=lambda rate: found[rate])
            known["searched"][name] = {f"{rate:.3g}": share for rate, share in found.items()}
            write(known)
    return 0


def last_suite(folder: Path) -> SuiteResult:
    run = load_run(folder)
    return run.suites[f"iteration-{run.iterations[-1]}"]


def scores_of(name: str, measure: str, runs: Path) -> Scores:
    """Scores of `arm`, `arm@iteration` or, for iteration 0, its base: by seed, prompt and image, of every
    finished run."""
    arm, _, iterate = name.partition("@")
    found: Scores = {}
    for folder in sorted(runs.glob(f"{arm}-*")):
        seed = folder.name.removeprefix(f"{arm}-")
        if not seed.isdigit() or int(seed) == SEARCH_SEED or not is_finished(folder):
            continue
        version = "base" if iterate == "0" else f"iteration-{iterate}"
        suite = load_suite(folder / "eval" / version) if iterate else last_suite(folder)
        values = (
            {(prompt, 0): value for prompt, value in suite.vendi.items()}
            if measure == "vendi"
            else suite.by_image(measure)
        )
        found |= {(int(seed), *key): value for key, value in values.items()}
    return found


def verdicts(runs: Path) -> list[Json]:
    """A row for each claim whose two arms have a finished run of the same seed."""
    rows = []
    by_measure: dict[str, list[Claim]] = defaultdict(list)
    for claim in CLAIMS:
        by_measure[claim.measure].append(claim)
    for measure, claims in by_measure.items():
        names = {name for claim in claims for name in (claim.first, claim.second)}
        models = {name: scores for name in sorted(names) if (scores := scores_of(name, measure, runs))}
        couples = [(each.first, each.second) for each in claims if {each.first, each.second} <= models.keys()]
        compared = {(one.first, one.second): one for one in compare_models(models, couples)}
        for claim in claims:
            one = compared.get((claim.first, claim.second))
            if one is None:
                continue
            mean, low, high = one.difference
            first, second = models[claim.first], models[claim.second]
            both = [key for key in first if key in second]
            differences = np.array([first[key] - second[key] for key in both])
            spread = measured_spread(differences, [key[1] for key in both])
            is_decided = not math.isnan(low) and (low > 0 or high < 0)
            needed = (
                None if is_decided or mean == 0 else num_prompts_needed(mean, spread, images=one.num_seeds)
            )
            rows.append(
                vars(claim)
                | {
                    "first_mean": float(np.mean([first[key] for key in both])),
                    "second_mean": float(np.mean([second[key] for key in both])),
                    "difference": {"mean": mean, "low": low, "high": high},
                    "p_holm": one.p_holm,
                    "seeds": one.num_seeds,
                    "prompts": one.num_prompts,
                    "verdict": ("holds" if mean > 0 else "does not hold") if is_decided else "undecided",
                    "prompts_needed": needed,
                }
            )
    return rows


def costs(runs: Path) -> Json:
    """Network evaluations and CPU minutes of each arm, means over its finished seeds."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in ARMS:
        for folder in sorted(runs.glob(f"{name}-[0-9]*")):
            clock = folder.with_name(f"{folder.name}.cpu_seconds")
            if folder.is_dir() and is_finished(folder) and clock.exists():
                lines = load_run(folder).metrics
                spent = sum(line.get("cost/network_evaluations") or 0 for line in lines)
                found[name].append((spent, float(clock.read_text()) / 60))
    return {
        name: {"network_evaluations": round(mean[0]), "cpu_minutes": mean[1]}
        for name, mean in ((name, np.mean(rows, axis=0)) for name, rows in found.items())
    }


def table(known: Json) -> str:
    """Markdown: every claim under its topic, with what is not run yet."""
    rows = {(row["says"], row["first"], row["second"]): row for row in known["claims"]}
    lines = []
    for topic in dict.fromkeys(claim.topic for claim in CLAIMS):
        lines += [
            f"### {topic}",
            "",
            "| claim | arms | difference [95%] | seeds x prompts | verdict |",
            "|---|---|---|---|---|",
        ]
        for claim in (each for each in CLAIMS if each.topic == topic):
            row = rows.get((claim.says, claim.first, claim.second))
            lines.append(f"| {claim.says} | {_arms(claim, row)} | {_difference(row)} | {_verdict(row)} |")
        lines.append("")
    return "\n".join(lines)


def _arms(claim: Claim, row: Json | None) -> str:
    if row is None:
        return f"`{claim.first}`, `{claim.second}`"
    return f"`{claim.first}` {_shown(claim, row['first_mean'])}, `{claim.second}` {_shown(claim, row['second_mean'])}"


def _shown(claim: Claim, value: float) -> str:
    return f"{100 * value:.1f}%" if claim.measure == "correct" else f"{value:.2f}"


def _difference(row: Json | None) -> str:
    if row is None:
        return "|"
    scale, unit = (100, " points") if row["measure"] == "correct" else (1, "")
    mean, low, high = (scale * row["difference"][key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f}{unit} [{low:+.2f}, {high:+.2f}] | {row['seeds']} x {row['prompts'] // max(row['seeds'], 1)}"


def _verdict(row: Json | None) -> str:
    if row is None:
        return "not run"
    if row["verdict"] != "undecided":
        return f"**{row['verdict']}** (p {row['p_holm']:.2g})"
    needed = row["prompts_needed"]
    return "undecided" + (f": {needed:,} prompts would decide it" if needed else "")


def plan(names: list[str], runs: Path, seeds: list[int], known: Json) -> None:
    """Print each arm's network evaluations and the smallest difference that the seeds can show."""
    total = 0
    for name in names:
        settings = settings_of(name, runs, seeds[0], known["rates"].get(name))
        cost = cost_of(ARMS[name], settings)
        total += cost * len(seeds)
        print(f"{name:24s} {cost:>9,} network evaluations a seed  {ARMS[name].recipe}")
    smallest = detectable_difference(PROMPTS, GUESSED, images=len(seeds))
    print(f"{total:,} network evaluations in training, {len(names)} arms x {len(seeds)} seeds")
    print(
        f"{PROMPTS} prompts and {len(seeds)} seeds show a difference of {100 * smallest:.1f} points 8 times in 10"
    )


def read() -> Json:
    return (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rates": {}, "searched": {}, "claims": []}
    )


def write(known: Json) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    RESULTS.write_text(json.dumps(known | {"commit": commit, "machine": machine}, indent=1) + "\n")


def write_docs(known: Json) -> None:
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else f"# The papers' claims\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(known)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("plan", "search", "run", "verdicts"), default="plan")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--docs", action="store_true", help="with verdicts: fill docs/claims.md")
    options = parser.parse_args()
    known = read()
    if options.what == "plan":
        plan(options.arms, options.runs, options.seeds, known)
    elif options.what == "search":
        sys.exit(search(options.arms, options.runs, known))
    elif options.what == "run":
        options.runs.mkdir(parents=True, exist_ok=True)
        failed = []
        for seed, name in product(options.seeds, options.arms):
            code = finish(name, options.runs, seed, known["rates"])
            if code == INTERRUPTED:
                sys.exit(INTERRUPTED)
            failed += [f"{name}-{seed}"] if code else []
        if failed:
            sys.exit(f"not finished: {', '.join(failed)}")
    else:
        fresh = verdicts(options.runs)
        again = {(row["says"], row["first"], row["second"]) for row in fresh}
        kept = [row for row in known["claims"] if (row["says"], row["first"], row["second"]) not in again]
        known |= {"claims": [*kept, *fresh], "costs": known.get("costs", {}) | costs(options.runs)}
        write(known)
        print(table(known))
        if options.docs:
            write_docs(known)


if __name__ == "__main__":
    main()
