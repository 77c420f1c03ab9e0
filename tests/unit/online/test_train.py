"""What an iteration's errors are measured against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.config.schema import TuningConfig
from diffexpo.online.loop import run, schedule
from diffexpo.online.stages import STAGES, train
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.metrics import read_metrics
from tests.learning.toy import PATHS, make_loop, online_config

QUIET = {**STAGES, "evaluate": lambda loop, iteration: None}
TUNINGS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "lora": {"rank": 2, "target_modules": ["first", "last"]}},
}


def settings(reference: str, decay: float = 0.5) -> RunConfig:
    algorithm = {"type": "diffusion_dpo", "beta": 30.0, "reference": reference, "reference_decay": decay}
    explore = {"iterations": 4, "prompts_per_iteration": 8, "images_per_prompt": 2}
    return online_config("vp", algorithm=algorithm, explore=explore, training={"steps": 3})


def references(
    config: RunConfig, tuning: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, until: int = 4
) -> dict[int, dict[str, Tensor]]:
    """The reference with which each iteration is trained; after `until` the run goes on as a new process would."""
    found = {}
    set_reference = train.set_reference

    def seen(loop, iteration):
        set_reference(loop, iteration)
        found[iteration] = loop.policy.weights.state("reference")

    monkeypatch.setattr(train, "set_reference", seen)
    path = PATHS["vp"]
    policies = [ToyPolicy(path, tuning=TuningConfig.model_validate(TUNINGS[tuning])) for _ in range(2)]
    run(make_loop(config, policies[0], folder), QUIET, ("train", until))
    run(make_loop(config, policies[1], folder), QUIET)
    return found


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_average_of_iterates_is_the_mixture_by_hand(
    tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = references(settings("ema", 0.75), tuning, tmp_path, monkeypatch)
    policy = ToyPolicy(PATHS["vp"], tuning=TuningConfig.model_validate(TUNINGS[tuning]))
    mean = policy.weights.state("current")
    for iteration in (1, 2, 3, 4):
        assert found[iteration].keys() == mean.keys()
        for name, value in mean.items():
            # Three steps of two products and a sum in float32.
            torch.testing.assert_close(found[iteration][name], value, rtol=1e-6, atol=1e-7)
        iterate = load_file(tmp_path / "checkpoints" / f"weights-{iteration:04d}.safetensors")
        mean = {name: 0.75 * value + 0.25 * iterate[name] for name, value in mean.items()}
    assert max(float((found[4][name] - found[1][name]).abs().max()) for name in mean) > 1e-3


def test_a_run_that_goes_on_has_the_same_average_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("ema")
    assert ("train", 4) in schedule(config)
    whole = references(config, "full", tmp_path / "whole", monkeypatch)
    parts = references(config, "full", tmp_path / "parts", monkeypatch, until=2)
    assert all(torch.equal(whole[t][name], parts[t][name]) for t in whole for name in whole[t])
    one, two = (tmp_path / name / "checkpoints" / "weights-0004.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_the_common_part_in_the_log_is_that_of_the_errors_beside_it(tmp_path: Path) -> None:
    run(make_loop(settings("base"), ToyPolicy(PATHS["vp"]), tmp_path), QUIET, ("train", 2))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["phase"] == "train"]
    for row in rows:
        current, reference = (
            row[f"train/winner_{what}"] + row[f"train/loser_{what}"] for what in ("error", "reference_error")
        )
        # Float32 sums of 32 rows: some eps of the errors, of which the rise is a part.
        assert row["train/common_part"] == pytest.approx(current / reference - 1, abs=1e-5)
    assert len(rows) == 6 and max(abs(row["train/common_part"]) for row in rows) > 1e-3


@pytest.mark.parametrize(("reference", "decay"), [("previous", 0.0), ("base", 1.0)])
def test_the_ends_of_the_average_are_the_previous_iterate_and_the_start(
    reference: str, decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = references(settings("ema", decay), "full", tmp_path / "ema", monkeypatch)
    plain = references(settings(reference), "full", tmp_path / "plain", monkeypatch)
    assert all(torch.equal(ends[t][name], plain[t][name]) for t in ends for name in ends[t])
