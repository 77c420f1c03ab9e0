"""Nothing changes for users: an earlier commit and the present code side by side on one machine.

    .venv/bin/python benchmarks/same_results.py                # against e056383; some 20 minutes
    .venv/bin/python benchmarks/same_results.py HEAD~3 --quick # small settings, for trying it out

A git worktree of the earlier commit stands in a temporary folder. Both codes run under this Python and its
packages, with the same number of threads (another number, or another processor, sums in another order), and
are compared in

1. the resolved settings of every recipe of the earlier commit (differences in DOCUMENTED are shown and
   allowed);
2. the weights after every iteration of whole runs (--recipes), bit for bit;
3. a run that the earlier code began: the present code resumes it to the bits of the earlier code's
   uninterrupted run, reports and exports.

Exit code 0: all the same; 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "e056383"
# Settings that differ on purpose: dotted key (and everything below it) -> reason. CHANGELOG.md tells users.
NEW = "a new setting, whose default leaves everything as it was"
DOCUMENTED: dict[str, str] = {
    "algorithm.draws": NEW,
    "algorithm.reference_decay": NEW,
    "algorithm.anchor_weight": NEW,
    "algorithm.anchor_guidance": NEW,
    "algorithm.signal_pairs": NEW,
}
SMALL = (
    "explore.iterations=2",
    "explore.prompts_per_iteration=4",
    "explore.images_per_prompt=2",
    "training.steps=2",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "training.checkpoint_every=1",
    "offline.limit=8",
    "evaluation.num_prompts=2",
    "evaluation.kl_prompts=0",
    "evaluation.vendi_prompts=0",
    "evaluation.grid_prompts=1",
    "baseline.offline_dpo=false",
)
SETTINGS = """
import json, sys
import diffexpo
from diffexpo.config import load_config
found = {name: load_config([name], [], {}).config.model_dump(mode="json") for name in sys.argv[1:]}
json.dump({"code": diffexpo.__file__, "settings": found}, sys.stdout)
"""


@dataclass(frozen=True)
class Code:
    """A tree of the repository, and how its code is run."""

    name: str
    tree: Path
    threads: int

    def start(self, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """`diffexpo ARGUMENTS` with what it prints in `log`."""
        words = [sys.executable, "-m", "diffexpo", *map(str, arguments)]
        with log.open("ab") as out:
            return subprocess.Popen(words, stdout=out, stderr=out, cwd=log.parent, env=self.environment())

    def run(self, *arguments: str | Path, log: Path) -> None:
        """`diffexpo ARGUMENTS` until it ends well."""
        finish(self.start(*arguments, log=log), log)

    def settings(self, recipes: list[str]) -> dict[str, dict[str, object]]:
        done = subprocess.run(
            [sys.executable, "-c", SETTINGS, *recipes],
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
        )
        if done.returncode:
            sys.exit(f"{self.name}: the recipes cannot be read\n{done.stderr}")
        found = json.loads(done.stdout)
        if not Path(found["code"]).is_relative_to(self.tree):
            sys.exit(f"{self.name}: ran {found['code']}, which is not in {self.tree}")
        return {name: flat(values) for name, values in found["settings"].items()}

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DIFFEXPO_")}
        threads = str(self.threads)
        return kept | {
            "PYTHONPATH": str(self.tree / "src"),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NO_COLOR": "1",
        }


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {log}\n{log.read_text()[-3000:]}")


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys of nested mappings."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A commit's tree in a folder, as long as it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare_settings(old: Code, new: Code) -> list[str]:
    """What differs in the recipes of the earlier commit."""
    root = old.tree / "src" / "diffexpo" / "recipes"
    recipes = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    ours, theirs = new.settings(recipes), old.settings(recipes)
    problems, allowed, missing = [], set(), "(no such setting)"
    for recipe in recipes:
        for key in sorted(ours[recipe].keys() | theirs[recipe].keys()):
            before, after = theirs[recipe].get(key, missing), ours[recipe].get(key, missing)
            if before == after:
                continue
            reason = next((DOCUMENTED[own] for own in DOCUMENTED if f"{key}.".startswith(f"{own}.")), None)
            if reason is None:
                problems.append(f"{recipe}: {key} was {before!r}, is {after!r}")
            else:
                allowed.add(f"  allowed: {key}: {reason}")
    print(f"settings: {len(recipes)} recipes, {sum(map(len, theirs.values()))} values", flush=True)
    print("".join(f"{line}\n" for line in sorted(allowed)), end="")
    return problems


def compare_weights(one: Path, other: Path, what: str) -> list[str]:
    """What differs between two folders' weights after each iteration."""
    names = [
        sorted(path.name for path in folder.glob("checkpoints/weights-*.safetensors"))
        for folder in (one, other)
    ]
    if names[0] != names[1] or not names[0]:
        return [f"{what}: files of weights {names[0]} and {names[1]}"]
    problems = []
    for name in names[0]:
        before, after = (folder / "checkpoints" / name for folder in (one, other))
        if before.read_bytes() == after.read_bytes():
            print(f"{what}: {name} is the same, {before.stat().st_size:,} bytes", flush=True)
            continue
        first, second = load_file(before), load_file(after)
        common = first.keys() & second.keys()
        apart = max((float(abs(first[key] - second[key]).max()) for key in common), default=float("nan"))
        problems.append(f"{what}: {name} differs, by {apart:.3g} at most, {len(common)} tensors in common")
    return problems


def compare_runs(old: Code, new: Code, recipe: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Whole runs of a recipe by both codes at once."""
    name = recipe.replace("/", "-")
    made = None if options.old_runs is None else options.old_runs / Path(recipe).name
    if made is not None:
        threads = json.loads((made / "env.json").read_text())["threads"]
        if threads != options.threads:
            sys.exit(f"{made} was made with {threads} threads; run with --threads {threads}")
    arguments = ["run", recipe, "--set", f"seed={options.seed}"]
    arguments += [word for setting in (SMALL if options.quick else ()) for word in ("--set", setting)]
    folders, processes = {}, {}
    for code in (new,) if made is not None else (new, old):
        folders[code.name] = folder / f"{name}-{code.name}"
        log = folder / f"{name}-{code.name}.log"
        processes[log] = code.start(*arguments, "--out", folders[code.name], log=log)
    for log, process in processes.items():
        finish(process, log)
    return compare_weights(made or folders[old.name], folders[new.name], recipe)


def compare_resuming(old: Code, new: Code, folder: Path) -> list[str]:
    """A small run by the old code, whole and stopped: the new code ends, reports and exports the latter."""
    small = [word for setting in SMALL for word in ("--set", setting)]
    whole, begun, log = folder / "small-whole", folder / "small-begun", folder / "small.log"
    old.run("run", "emoji/quick", *small, "--out", whole, log=log)
    old.run("run", "emoji/quick", *small, "--out", begun, "--stop-after", "train-1", log=log)
    new.run("run", "--resume", begun, log=log)
    problems = compare_weights(whole, begun, "resumed by the new code")
    for run in (whole, begun):
        for command, file in (("report", "report.html"), ("export", "export/model_index.json")):
            (run / file).unlink(missing_ok=True)
            new.run(command, run, log=log)
            if not (run / file).exists():
                problems.append(f"{command} of {run.name}, a run of the old code: no {file}")
    print("report and export: both run folders", flush=True)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", nargs="?", default=BEFORE, metavar="OLD_REV", help="the earlier commit")
    parser.add_argument(
        "--recipes", nargs="*", default=["emoji/quick", "emoji/expo"], help="whole runs to compare"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--quick", action="store_true", help="small settings in the whole runs too")
    parser.add_argument(
        "--old-runs",
        type=Path,
        metavar="FOLDER",
        help="holds runs that the earlier commit made on this machine (quick/, expo/), instead of new ones",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep runs and logs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        folder = (options.keep or Path(temporary) / "runs").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with worktree(options.revision, Path(temporary) / "tree") as tree:
            old, new = Code("old", tree, options.threads), Code("new", ROOT, options.threads)
            problems = compare_settings(old, new)
            for recipe in options.recipes:
                problems += compare_runs(old, new, recipe, options, folder)
            problems += compare_resuming(old, new, folder)
    print("\n".join(problems) or f"all the same as {options.revision}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
