"""What an iteration's errors are measured against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.config.schema import TuningConfig
from diffexpo.errors import Interrupted, ResumeError
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


def settings(reference: str, decay: float = 0.5, **more: object) -> RunConfig:
    algorithm = {"type": "diffusion_dpo", "beta": 30.0, "reference": reference, "reference_decay": decay}
    explore = {"iterations": 4, "prompts_per_iteration": 8, "images_per_prompt": 2}
    training = {"steps": 3, "checkpoint_every": 1}
    return online_config("vp", algorithm=algorithm | more, explore=explore, training=training)


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


def test_an_average_of_iterates_is_read_from_its_file_and_made_anew_where_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("ema", 0.75)
    whole = references(config, "full", tmp_path / "whole", monkeypatch)
    files = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("reference-*"))
    assert files == ["reference-0002.safetensors", "reference-0003.safetensors"]
    run(make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path / "parts"), QUIET, ("train", 3))
    folder = tmp_path / "parts" / "checkpoints"
    asked: list[int] = []
    load = train.load_iterate
    monkeypatch.setattr(
        train, "load_iterate", lambda loop, number, name: asked.append(number) or load(loop, number, name)
    )
    loop = make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path / "parts")
    for gone, read in (((), [3]), (("0002", "0003"), [1, 2, 3]), ((), [])):
        for number in gone:
            (folder / f"reference-{number}.safetensors").unlink()
        asked.clear()
        found = train.reference_after(loop, 3)
        assert asked == read
        assert all(torch.equal(found[name], value) for name, value in whole[4].items())


# ---- an average over optimiser steps -------------------------------------------------------------------------


def trained(config: RunConfig, folder: Path, *, stop: int | None = None) -> None:
    """A whole run; with `stop` it is stopped in that step of its training, and goes on."""
    loop, steps = make_loop(config, ToyPolicy(PATHS["vp"]), folder), [0]
    train_iteration = loop.engine.train_iteration

    def counted(*given: object, **named: object) -> object:
        def tick() -> None:
            steps[0] += 1
            if steps[0] == stop:
                raise Interrupted("stopped")

        return train_iteration(*given, **named | {"tick": tick})

    loop.engine.train_iteration = counted
    if stop is None:
        run(loop, QUIET)
        return
    with pytest.raises(Interrupted, match=f"iteration {1 + (stop - 1) // 3}, step {(stop - 1) % 3} of 3"):
        run(loop, QUIET)
    trained(config, folder)


STEPWISE = {"reference_decay": 0.9, "reference_follows": "step"}


@pytest.mark.parametrize("name", ["diffusion_dpo", "expo"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_an_average_over_steps_is_the_one_that_numpy_makes(tuning: str, name: str, tmp_path: Path) -> None:
    config = settings("ema", type=name, **STEPWISE)
    policy = ToyPolicy(PATHS["vp"], tuning=TuningConfig.model_validate(TUNINGS[tuning]))
    start = {key: value.double().numpy() for key, value in policy.weights.state("current").items()}
    loop = make_loop(config, policy, tmp_path)
    algorithm, seen = loop.engine.algorithm, []
    follow = algorithm.after_step

    def after_step(policy: ToyPolicy, step: int) -> None:
        seen.append(policy.weights.state("current"))
        follow(policy, step)

    algorithm.after_step = after_step
    run(loop, QUIET)
    assert len(seen) == 12, (
        "three steps in each of four iterations, the first of which learns from offline pairs"
    )
    kept = load_file(tmp_path / "checkpoints" / "reference-0004.safetensors")
    moved = 0.0
    for key, value in start.items():
        mean = value
        for state in seen:
            mean = 0.9 * mean + 0.1 * state[key].double().numpy()
        # Twelve float32 steps of a sum of two products.
        bound = 2e-6 * max(1.0, float(np.abs(mean).max()))
        np.testing.assert_allclose(kept[key].numpy(), mean, rtol=0, atol=bound)
        assert torch.equal(kept[key], policy.weights.state("reference")[key])
        moved = max(moved, float(np.abs(mean - value).max()))
    assert moved > 1e-3


@pytest.mark.parametrize("stop", [2, 4, 9, 12])
def test_stopped_in_training_an_average_over_steps_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    config = settings("ema", **STEPWISE)
    trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", stop=stop)
    for name in ("weights-0004", "reference-0004"):
        one, two = (
            tmp_path / folder / "checkpoints" / f"{name}.safetensors" for folder in ("whole", "parts")
        )
        assert one.read_bytes() == two.read_bytes()


def test_where_the_first_iteration_is_idle_an_average_over_steps_starts_with_the_second(
    tmp_path: Path,
) -> None:
    config = settings("ema", **STEPWISE)
    config = config.model_copy(update={"offline": config.offline.model_copy(update={"source": None})})
    loop = make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path)
    run(loop, QUIET)
    files = sorted(path.name for path in (tmp_path / "checkpoints").glob("reference-*"))
    assert files == ["reference-0003.safetensors", "reference-0004.safetensors"]
    assert all(
        torch.equal(value, loop.initial[name]) for name, value in train.reference_after(loop, 1).items()
    )


def test_an_average_over_steps_that_is_gone_is_not_guessed(tmp_path: Path) -> None:
    config = settings("ema", **STEPWISE)
    run(make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path), QUIET, ("train", 2))
    (tmp_path / "checkpoints" / "reference-0002.safetensors").unlink()
    with pytest.raises(ResumeError, match="reference-0002.* is missing although iteration 2 is complete"):
        run(make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path), QUIET)


# ---- a reference that waits for a distance ---------------------------------------------------------------------


def test_a_reference_with_a_budget_becomes_the_iterate_whose_distance_passes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings("previous")
    free = references(plain, "full", tmp_path / "free", monkeypatch)
    held = references(settings("previous", reference_budget=1e9), "full", tmp_path / "held", monkeypatch)
    assert all(torch.equal(held[t][name], value) for t in held for name, value in held[1].items())
    store = make_loop(plain, ToyPolicy(PATHS["vp"]), tmp_path / "held").store
    distances = [store.manifest("train", t)["train/reference_distance"] for t in (1, 2, 3)]
    assert 0 < distances[0] < distances[1], "from where it began the policy only moves away"
    # Below the first distance it is the previous iterate throughout; between the two it stays for one iteration.
    tight = references(
        settings("previous", reference_budget=0.5 * distances[0]), "full", tmp_path / "tight", monkeypatch
    )
    assert all(torch.equal(tight[2][name], value) for name, value in free[2].items())
    between = (distances[0] + distances[1]) / 2
    found = references(settings("previous", reference_budget=between), "full", tmp_path / "once", monkeypatch)
    assert all(torch.equal(found[2][name], value) for name, value in found[1].items())
    second = load_file(tmp_path / "once" / "checkpoints" / "weights-0002.safetensors")
    assert all(torch.equal(found[3][name], value) for name, value in second.items())
