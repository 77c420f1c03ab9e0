"""Killed anywhere, a resumed run ends with the very same weights, pairs and metrics."""

import json

import pytest

from tests.invariants.conftest import SIGINT, SIGKILL, diffexpo, kill_when, pair_rows, run_arguments, weights


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = lambda name: name == "wall_s" or name.startswith(("time/", "mem/"))
    return [{name: value for name, value in row.items() if not timeless(name)} for row in rows]


MOMENTS = {
    "in training": "checkpoints/iteration-0002/checkpoint-*",
    "in collecting": "store/**/samples-0002-*",
    "before pairing": "store/manifests/collect-0001.json",
}


@pytest.mark.parametrize("pattern", MOMENTS.values(), ids=MOMENTS.keys())
def test_kill_9_and_resume_is_bit_identical(world, truth, tmp_path, pattern):
    run_dir = tmp_path / "run"
    arguments = run_arguments(world, run_dir)
    code = kill_when(arguments, lambda: any(run_dir.glob(pattern)), SIGKILL)
    assert code == -9, "the run ended before it could be killed"
    diffexpo("run", "--resume", run_dir)
    assert weights(run_dir) == weights(truth)
    assert pair_rows(run_dir) == pair_rows(truth)
    assert lines(run_dir) == lines(truth)


HELD = [
    word
    for setting in (
        "reference=ema",
        "reference_decay=0.7",
        "draws=2",
        "anchor_weight=0.1",
        "anchor_guidance=2",
    )
    for word in ("--set", f"algorithm.{setting}")
]


def test_a_killed_run_goes_on_with_the_same_average_of_iterates(world, tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    diffexpo(*run_arguments(world, whole), *HELD)
    arguments = [*run_arguments(world, run_dir), *HELD]
    moment = "checkpoints/iteration-0003/checkpoint-*"
    assert kill_when(arguments, lambda: any(run_dir.glob(moment)), SIGKILL) == -9
    diffexpo("run", "--resume", run_dir)
    assert weights(run_dir) == weights(whole)
    assert lines(run_dir) == lines(whole)


def test_ctrl_c_saves_exits_75_and_resumes(world, truth, tmp_path):
    run_dir = tmp_path / "run"
    arguments = run_arguments(world, run_dir)
    code = kill_when(arguments, lambda: any(run_dir.glob(MOMENTS["in training"])), SIGINT)
    assert code == 75
    assert "--resume" in (run_dir / "log.txt").read_text()
    diffexpo("run", "--resume", run_dir)
    assert weights(run_dir) == weights(truth)


def test_a_finished_run_says_so_and_changes_nothing(truth):
    before = weights(truth)
    done = diffexpo("run", "--resume", truth)
    assert "complete" in done.out
    assert weights(truth) == before


def test_another_config_in_the_same_folder_is_refused(world, truth):
    done = diffexpo(*run_arguments(world, truth), "--set", "seed=8", check=False)
    assert done.code == 2 and "--resume" in done.err
