"""Signal of one draw's margin in a run: keyed, within its share of the cost, and without effect on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffexpo.config import RunConfig
from diffexpo.errors import Interrupted
from diffexpo.online.cost import training_cost
from diffexpo.online.loaders import batches_of
from diffexpo.online.loop import Loop, run
from diffexpo.online.signal import DRAWS, SHARE, measure_signal
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.metrics import read_metrics
from tests.learning.toy import PATHS, make_loop, online_config

QUIET = {**STAGES, "evaluate": lambda loop, iteration: None}
START = {f"signal/start/{name}" for name in ("ratio", "low", "high", "pairs")}
END = {f"signal/end/{name}" for name in ("ratio", "low", "high", "pairs", "logit_noise")}


def settings(**algorithm: object) -> RunConfig:
    explore = {"iterations": 3, "prompts_per_iteration": 8, "images_per_prompt": 2}
    chosen = {"type": "diffusion_dpo", "beta": 30.0} | algorithm
    return online_config("vp", algorithm=chosen, explore=explore, training={"steps": 60})


def ready(folder: Path, **algorithm: object) -> Loop:
    return make_loop(settings(**algorithm), ToyPolicy(PATHS["vp"]), folder)


def signals(folder: Path) -> dict[int, dict[str, Any]]:
    """What each iteration's summary says of the signal."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["phase"] == "train_summary"]
    return {
        line["iteration"]: {name: value for name, value in line.items() if name.startswith("signal/")}
        for line in lines
    }


def test_every_iteration_is_measured_and_training_does_not_notice(tmp_path: Path) -> None:
    measured, plain = ready(tmp_path / "measured"), ready(tmp_path / "plain", signal_pairs=0)
    for loop in (measured, plain):
        run(loop, QUIET)
    assert measured.policy.weights.fingerprint("current") == plain.policy.weights.fingerprint("current")
    found = signals(tmp_path / "measured")
    assert all(line.keys() == START | END for line in found.values()) and set(found) == {1, 2, 3}
    assert set(signals(tmp_path / "plain")) == {1, 2, 3} and not any(signals(tmp_path / "plain").values())
    for line in found.values():
        for moment in ("start", "end"):
            ratio, low, high = (line[f"signal/{moment}/{name}"] for name in ("ratio", "low", "high"))
            assert 0 <= low <= ratio <= high and high > 0
    own = [line["signal/start/ratio"] for line in found.values()]
    assert len(set(own)) == 3
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("measured", "plain"))
    for line in (*one, *other):
        for name in [name for name in line if name.startswith(("signal/", "time/", "mem/", "wall_s"))]:
            del line[name]
    assert one == other


def test_a_run_that_is_stopped_while_it_measures_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    whole = ready(tmp_path / "whole")
    run(whole, QUIET)
    parts = ready(tmp_path / "parts")
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        # One part is measured at the start, then come the steps, one micro-batch each, and the end.
        if calls == 1 + 60 + 1:
            raise Interrupted("stopped")

    parts.check_signals = stop
    with pytest.raises(Interrupted):
        run(parts, QUIET)
    assert signals(tmp_path / "parts") == {}
    run(ready(tmp_path / "parts"), QUIET)
    assert signals(tmp_path / "parts") == signals(tmp_path / "whole")


class CountingPolicy(ToyPolicy):
    """Counts rows of every forward."""

    rows = 0

    def predict(self, x_t, t, conditioning):
        self.rows += len(x_t)
        return super().predict(x_t, t, conditioning)


@pytest.mark.parametrize(("kind", "evaluations"), [("sigmoid", 3), ("simpo", 2)])
def test_measuring_stays_within_its_share_of_the_training(
    kind: str, evaluations: int, tmp_path: Path
) -> None:
    config = settings(kind=kind)
    policy = CountingPolicy(PATHS["vp"])
    loop = make_loop(config, policy, tmp_path)
    loader = batches_of(loop, 1).loader
    found = measure_signal(loop, 1, loader, "start") | measure_signal(loop, 1, loader, "end")
    count = found["signal/start/pairs"]
    assert count == found["signal/end/pairs"] < config.algorithm.signal_pairs
    assert policy.rows == count * 2 * DRAWS * evaluations
    assert policy.rows <= SHARE * training_cost(config, 1) < policy.rows + 2 * DRAWS * evaluations
    # Without a reference nothing is subtracted from a margin, and there is no logit of changes.
    assert ("signal/end/logit_noise" in found) is (kind == "sigmoid")


def test_too_little_training_is_not_measured_and_few_pairs_all_are(tmp_path: Path) -> None:
    short = online_config("vp", training={"steps": 1})
    run(make_loop(short, ToyPolicy(PATHS["vp"]), tmp_path / "short"), QUIET, ("train", 1))
    assert signals(tmp_path / "short") == {1: {}}
    few = make_loop(settings(), ToyPolicy(PATHS["vp"]), tmp_path / "few", offline_pairs=3)
    run(few, QUIET, ("train", 1))
    assert signals(tmp_path / "few")[1]["signal/end/pairs"] == 3
