"""A tiny run, broken at one operation on its files, resumed, and compared with one that nothing happened to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.commands import Done, command, start
from tests.world import pair_rows, weights

SETS = (
    "explore.iterations=2",
    "explore.prompts_per_iteration=2",
    "training.steps=2",
    "training.checkpoint_every=1",
    "evaluation.num_prompts=2",
    "evaluation.kl_prompts=0",
    "evaluation.bootstrap=20",
    "evaluation.every_iteration=false",
    "offline.limit=4",
)


@dataclass(frozen=True)
class Bench:
    """Where runs are made, from which recipe."""

    recipe: Path
    folder: Path

    def run(self, name: str, at: int | None = None, kind: str = "kill") -> Done:
        """A new run, with a fault at an operation, or with none."""
        out, log = self.folder / name, self.folder / f"{name}.log"
        fault = json.dumps({"root": str(out), "log": str(log), "at": at, "kind": kind})
        sets = [word for setting in SETS for word in ("--set", setting)]
        arguments = ("run", self.recipe, "--out", out, *sets)
        return start(*arguments, module="tests.faults.shim", FAULT=fault).wait()

    def operations(self, name: str) -> list[str]:
        """What was counted: operation and file."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines]

    def resume(self, name: str) -> Done:
        """The rest of it; from the start where there is nothing to go on with."""
        if (self.folder / name / "config.yaml").exists():
            return command("run", "--resume", self.folder / name)
        sets = [word for setting in SETS for word in ("--set", setting)]
        return command("run", self.recipe, "--out", self.folder / name, *sets)

    def problems(self, name: str, kind: str, broken: Done, whole: Path) -> list[str]:
        """What is not as it must be after a fault; the run is resumed here."""
        found, killed = [], kind in ("kill", "torn")
        if killed and broken.code != -9:
            found.append(f"ended with {broken.code} instead of the kill")
        if not killed and broken.code not in (0, 4):
            found.append(f"ended with {broken.code}: {broken.err[-300:]}")
        if not killed and ("defect" in broken.err or "Traceback" in broken.err):
            found.append(f"calls it a defect: {broken.err[-300:]}")
        if not killed and broken.code == 4 and "error: " not in broken.err:
            found.append(f"says nothing: {broken.err[-300:]}")
        if state(self.folder / name) == "finished" and not has_ended(self.folder / name):
            found.append("is called finished without report and export")
        resumed = self.resume(name)
        if resumed.code != 0:
            return [*found, f"does not resume: {resumed.err[-500:]}"]
        if not has_ended(self.folder / name):
            found.append("has no report or export after the resume")
        for what, value in outcome(self.folder / name).items():
            if value != outcome(whole)[what]:
                found.append(f"ends with other {what}")
        return found


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a run came to, without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = lambda name: name == "wall_s" or name.startswith(("time/", "mem/"))
    suites = {}
    for path in sorted(run_dir.glob("eval/*/suite.json")):
        suites[path.parent.name] = json.loads(path.read_text())
        for name in ("seconds", "sha256"):
            suites[path.parent.name].pop(name)
    return {
        "weights": weights(run_dir),
        "pairs": pair_rows(run_dir),
        "metrics": [{name: value for name, value in line.items() if not timed(name)} for line in lines],
        "evaluations": suites,
    }


def state(run_dir: Path) -> str:
    path = run_dir / "status.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else "nothing"


def has_ended(run_dir: Path) -> bool:
    """Whether report and export are there and hold something."""
    exported = [path for path in (run_dir / "export").rglob("*.safetensors") if path.stat().st_size > 0]
    report = run_dir / "report.html"
    return bool(exported) and report.is_file() and report.stat().st_size > 0
