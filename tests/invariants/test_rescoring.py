"""Stored images judged anew: the same judge gives the same rows, another one other pairs, and nothing is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffexpo.data.store import Store
from diffexpo.training.metrics import read_metrics
from tests.commands import command
from tests.commands import diffexpo as succeed
from tests.world import pair_rows

DARK = "rewards=[{name: dark, type: python, path: '%s/dark.py:dark'}]"


@pytest.fixture(scope="module")
def dark(world: Path) -> str:
    """The setting of a reward that prefers what the run's first reward dislikes."""
    (world / "dark.py").write_text(
        "def dark(images, prompts):\n    return (-images.mean(dim=(1, 2, 3))).tolist()\n"
    )
    return DARK % world


def test_the_same_judge_gives_the_same_rows_and_pairs(truth: Path, tmp_path: Path) -> None:
    succeed("rescore", truth, "--to", tmp_path / "again")
    before, after = (Store(run / "store", create=False) for run in (truth, tmp_path / "again"))
    for iteration in (1, 2):
        assert after.collected(iteration) == before.collected(iteration)
        ids = [sample.sample_id for sample in after.collected(iteration)]
        assert np.array_equal(after.latents(ids), before.latents(ids))
    assert after.samples(0) == before.samples(0)
    assert pair_rows(tmp_path / "again") == pair_rows(truth)
    assert after.verify() > 0


def test_another_judge_turns_the_pairs_and_the_run_goes_on_without_drawing(
    truth: Path, dark: str, tmp_path: Path
) -> None:
    done = succeed("rescore", truth, "--to", tmp_path / "dark", "--set", dark, "--json")
    told = json.loads(done.out)
    before, after = (Store(run / "store", create=False) for run in (truth, tmp_path / "dark"))
    images = sum(len(before.collected(iteration)) for iteration in (1, 2))
    assert told["images"] == images and told["pairs"] == len(after.pairs(source="online"))
    for one in after.collected(1):
        brightness = before.sample(one.sample_id).scores["brightness"]
        assert list(one.scores) == ["dark"] and one.scores["dark"] == pytest.approx(-brightness, abs=1e-6)
    for pair in after.pairs(1):
        winner, loser = (after.sample(name).scores["dark"] for name in (pair.winner_id, pair.loser_id))
        assert winner > loser and pair.judge == "dark"
    assert (tmp_path / "dark" / "status.json").read_text().find("stopped") > 0
    succeed("run", "--resume", tmp_path / "dark", "--stop-after", "train-2")
    lines = read_metrics(tmp_path / "dark" / "metrics.jsonl")
    drawn = [line["cost/network_evaluations"] for line in lines if line["phase"] == "collect"]
    assert drawn == [0.0, 0.0]
    assert (tmp_path / "dark" / "checkpoints" / "weights-0002.safetensors").is_file()
    # The same command again changes nothing, and says that all is there.
    again = json.loads(succeed("rescore", truth, "--to", tmp_path / "dark", "--set", dark, "--json").out)
    assert again == told


def test_what_cannot_be_judged_anew_is_refused(truth: Path, world: Path, dark: str, tmp_path: Path) -> None:
    done = command("rescore", truth, "--to", tmp_path / "x", "--set", "training.steps=3")
    assert done.code == 2 and "expected settings of rewards, mixture, pairing" in done.message
    assert not (tmp_path / "x").exists()
    begun = tmp_path / "begun"
    (begun / "store").mkdir(parents=True)
    (begun / "config.yaml").write_bytes((truth / "config.yaml").read_bytes())
    done = command("rescore", begun, "--to", tmp_path / "x", "--set", dark)
    assert done.code == 3 and "no complete collection" in done.message
