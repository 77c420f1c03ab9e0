"""Killed anywhere, a resumed run ends with the very same weights, pairs and metrics."""

import json

from tests.invariants.conftest import SIGINT, SIGKILL, diffexpo, kill_when, pair_rows, run_arguments, weights


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = lambda name: name == "wall_s" or name.startswith(("time/", "mem/"))
    return [{name: value for name, value in row.items() if not timeless(name)} for row in rows]


# In the order in which a run comes to them.
MOMENTS = {
    "before pairing": "store/manifests/collect-0001.json",
    "in training": "checkpoints/iteration-0002/checkpoint-*",
    "in collecting": "store/**/samples-0002-*",
}


def test_killed_at_every_moment_and_resumed_is_bit_identical(world, truth, tmp_path):
    """One run, killed with signal 9 at one moment after the other, and stopped with Ctrl-C at last."""
    run_dir = tmp_path / "run"
    arguments = run_arguments(world, run_dir)
    for moment, pattern in MOMENTS.items():
        code = kill_when(arguments, lambda pattern=pattern: any(run_dir.glob(pattern)), SIGKILL)
        assert code == -9, f"the run ended before it could be killed {moment}"
        arguments = ["run", "--resume", str(run_dir)]
    in_last_training = "checkpoints/iteration-0003/checkpoint-*"
    code = kill_when(arguments, lambda: any(run_dir.glob(in_last_training)), SIGINT)
    assert code == 75, "Ctrl-C saves and exits with 75"
    assert "--resume" in (run_dir / "log.txt").read_text()
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


def test_a_finished_run_says_so_and_changes_nothing(truth):
    before = weights(truth)
    done = diffexpo("run", "--resume", truth)
    assert "complete" in done.out
    assert weights(truth) == before


def test_a_finished_run_says_which_settings_come_too_late(truth):
    had, wanted = 2, 1
    before = weights(truth), (truth / "config.yaml").read_bytes()
    done = diffexpo("run", "--resume", truth, "--set", f"training.micro_batch_size={wanted}")
    assert f"{truth} is finished" in done.err and "complete" in done.out
    assert f"training.micro_batch_size stays {had}, not {wanted}" in done.err
    assert (weights(truth), (truth / "config.yaml").read_bytes()) == before
    told = diffexpo("run", "--resume", truth, "--json", "--set", f"training.micro_batch_size={wanted}")
    assert f"stays {had}, not {wanted}" in told.err and json.loads(told.out)["state"] == "finished"
    assert "stays" not in diffexpo("run", "--resume", truth, "--set", f"training.micro_batch_size={had}").err


def test_another_config_in_the_same_folder_is_refused(world, truth):
    done = diffexpo(*run_arguments(world, truth), "--set", "seed=8", check=False)
    assert done.code == 2 and "--resume" in done.err
