"""A sweep runs every combination once, goes on after it was stopped, and ends in a comparison."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands import command, diffexpo, kill_when
from tests.invariants.conftest import SIGINT, weights


def test_a_stopped_sweep_goes_on_and_ends_with_the_same_weights(
    world: Path, truth: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    arguments = ["sweep", str(world / "recipe.yaml"), "--set", "seed=7,8", "--out", str(folder)]
    planned = diffexpo(*arguments, "--dry-run")
    assert "seed-7" in planned.out and "2 runs" in planned.out and not folder.exists()
    begun = folder / "seed-7" / "checkpoints" / "weights-0001.safetensors"
    assert kill_when(arguments, begun.exists, SIGINT) == 75
    assert not (folder / "comparison.html").exists()
    done = diffexpo(*arguments, "--processes", "2")
    assert "seed-7: goes on" in done.out and "seed-8: starts" in done.out
    assert weights(folder / "seed-7") == weights(truth)
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in found["groups"][0]["runs"]] == [7, 8]
    assert "nothing was run" in diffexpo(*arguments, "--dry-run").out
    assert "2 of 2 runs are finished already" in diffexpo(*arguments).out
    assert json.loads(diffexpo(*arguments, "--json").out) == found
    listed = json.loads(diffexpo(*arguments, "--dry-run", "--json").out)
    assert [(run["run"], run["state"]) for run in listed["runs"]] == [
        ("seed-7", "finished"),
        ("seed-8", "finished"),
    ]
    refused = command(*arguments, "--set", "training.steps=3")
    assert (
        refused.code == 2 and "holds a run with other settings (training.steps 6, now 3)" in refused.message
    )
    listed = diffexpo("compare", folder, "--out", tmp_path / "page", "--judge", "redness")
    assert "EXPO" in listed.out and (tmp_path / "page" / "comparison.csv").is_file()
