"""The engine does what a plain torch loop does, for any split, and stops and goes on without a trace."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from diffexpo.algorithms.forward import as_metrics
from diffexpo.config.methods.diffusion_nft import DiffusionNftConfig
from diffexpo.errors import DiffexpoError, Interrupted, ResumeError, TrainingError
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter, read_metrics
from diffexpo.training.progress import TrainReport
from diffexpo.types import LossOutput, PairBatch

from .tiny import LN2, TinyDpo, TinyLoader, TinyPolicy, settings

STEPS = 8


def train(
    folder: Path,
    *,
    loader: TinyLoader | None = None,
    policy: TinyPolicy | None = None,
    tick: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = pytest.fail,
    algorithm: TinyDpo | None = None,
    steps: int = STEPS,
    run_seed: int = 3,
    iteration: int = 1,
    initial_loss: float | None = LN2,
    **changes: object,
) -> tuple[dict[str, torch.Tensor], TrainReport]:
    policy = policy or TinyPolicy()
    metrics = MetricsWriter(folder / "metrics.jsonl")
    algorithm = algorithm or TinyDpo()
    engine = Engine(policy, algorithm, settings(**changes), metrics, initial_loss=initial_loss, warn=warn)
    report = engine.train_iteration(
        iteration,
        loader or TinyLoader(10),
        steps=steps,
        checkpoint_dir=folder / "checkpoints",
        run_seed=run_seed,
        tick=tick,
    )
    return policy.weights.state("current"), report


def lines(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name != "wall_s"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# What is equal but for the order of its sums is compared in float64 (fixture float64): some steps of ten
# rows, each with a few hundred roundings of 1e-16, times the 20 of beta, divided by gradients that AdamW
# normalises.
BOUND = 1e-10


def assert_close(line: dict, expected: dict) -> None:
    assert line.keys() == expected.keys() and line["phase"] == expected["phase"]
    numbers = {name: value for name, value in expected.items() if name != "phase"}
    assert {name: line[name] for name in numbers} == pytest.approx(numbers, rel=BOUND, abs=BOUND)


def stop_at(count: int) -> Callable[[], None]:
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Interrupted("stopped by SIGTERM")

    return tick


@pytest.mark.usefixtures("float64")
def test_one_step_after_another_is_a_plain_torch_loop(tmp_path: Path) -> None:
    weights, _ = train(tmp_path, ema_decay=0.0)
    policy, loader = TinyPolicy(), TinyLoader(10)
    parameters = list(policy.weights.trainable().values())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, foreach=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2))
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        TinyDpo().loss(policy, loader.batch(step), (3, 1, "train", step)).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, 0.5)))
        optimizer.step()
        schedule.step()
    for name, value in policy.weights.trainable().items():
        torch.testing.assert_close(weights[name], value.detach(), rtol=BOUND, atol=BOUND)
    logged = [line["train/grad_norm"] for line in lines(tmp_path)]
    assert logged == pytest.approx(norms, rel=BOUND)
    assert max(norms) > 0.5, "the clip must have been at work"


@pytest.mark.usefixtures("float64")
def test_the_first_loss_is_ln_2_and_the_metrics_are_means_over_pairs(tmp_path: Path) -> None:
    train(tmp_path)
    first = lines(tmp_path)[0]
    assert first["train/loss"] == pytest.approx(LN2, abs=BOUND)
    assert first["train/margin"] == 0.0
    policy, loader = TinyPolicy(), TinyLoader(10)
    total, count = (
        TinyDpo().loss(policy, loader.batch(0), (3, 1, "train", 0)).metrics["train/winner_reference_error"]
    )
    assert first["train/winner_reference_error"] == pytest.approx(float(total) / count, rel=BOUND)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("contrast", [0, 3])
def test_micro_batches_do_not_change_the_result(tmp_path: Path, contrast: int) -> None:
    results = []
    for size in (1, 3, 4, 10, 64):
        loader = TinyLoader(10, contrast)
        weights, _ = train(tmp_path / str(size), loader=loader, micro_batch_size=size, initial_loss=None)
        results.append((weights, lines(tmp_path / str(size))))
    for weights, log in results[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(value, results[0][0][name], rtol=BOUND, atol=BOUND)
        for line, expected in zip(log, results[0][1], strict=True):
            assert_close(line, expected)


def test_warm_up_then_constant(tmp_path: Path) -> None:
    train(tmp_path, warmup_fraction=0.5)
    assert [line["train/lr"] for line in lines(tmp_path)] == [
        1e-2 * min(1.0, step / 4) for step in range(1, 9)
    ]
    train(tmp_path / "none", warmup_fraction=0.0)
    assert {line["train/lr"] for line in lines(tmp_path / "none")} == {1e-2}


@pytest.mark.usefixtures("float64")
def test_the_average_is_the_iterate(tmp_path: Path) -> None:
    averaged, _ = train(tmp_path / "on", ema_decay=0.5)
    expected = TinyPolicy().weights.state("current")
    for steps in range(1, STEPS + 1):
        current = _after(tmp_path / str(steps), steps)
        expected = {name: 0.5 * value + 0.5 * current[name] for name, value in expected.items()}
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], rtol=BOUND, atol=BOUND)


def _after(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps of the same iteration, from the checkpoint that stopping there leaves."""
    if steps == STEPS:
        return train(folder)[0]
    policy = TinyPolicy()
    with pytest.raises(Interrupted):
        train(folder, policy=policy, tick=stop_at(steps * 3 + 1))
    return policy.weights.state("current")


def test_stopped_anywhere_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    ema_decay = 0.9
    expected, report = train(tmp_path / "whole", ema_decay=ema_decay)
    for ticks in range(1, STEPS * 3 + 1):
        folder = tmp_path / str(ticks)
        with pytest.raises(Interrupted, match=rf"SIGTERM \(iteration 1, step {(ticks - 1) // 3} of 8\)"):
            train(folder, tick=stop_at(ticks), ema_decay=ema_decay)
        weights, resumed = train(folder, ema_decay=ema_decay)
        assert_same(weights, expected)
        assert lines(folder) == lines(tmp_path / "whole")
        assert resumed.resumed_from == (ticks - 1) // 3
        assert resumed.metrics() == report.metrics()


def test_stopped_at_every_step_in_turn_equals_uninterrupted(tmp_path: Path) -> None:
    expected, _ = train(tmp_path / "whole")
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            train(tmp_path, tick=stop_at(3 * step + 2))
    assert_same(train(tmp_path)[0], expected)
    assert lines(tmp_path) == lines(tmp_path / "whole")


class Killed(BaseException):
    """Stands for kill -9: nothing is saved on the way out."""


def test_killed_anywhere_equals_uninterrupted_from_the_last_checkpoint(tmp_path: Path) -> None:
    expected, _ = train(tmp_path / "whole")
    for ticks in (1, 9, 10, 11, 17, 24):
        folder = tmp_path / str(ticks)
        calls = 0

        def tick(last: int = ticks) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed

        with pytest.raises(Killed):
            train(folder, tick=tick)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 1, "st')
        weights, resumed = train(folder)
        assert resumed.resumed_from == (ticks - 1) // 9 * 3
        assert_same(weights, expected)
        assert lines(folder) == lines(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_steps_but_not_the_result(tmp_path: Path) -> None:
    expected, _ = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path, tick=stop_at(STEPS * 3))
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "current.safetensors").write_bytes(b"torn")
    warnings: list[str] = []
    weights, report = train(tmp_path, warn=warnings.append)
    assert report.resumed_from == 6 and len(warnings) == 1 and newest.name in warnings[0]
    assert_same(weights, expected)
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_every_tick_is_made_up_for_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, tick=stop_at(14))
    ticks: list[int] = []
    train(tmp_path, tick=lambda: ticks.append(1))
    assert len(ticks) == STEPS * 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, tick=stop_at(14))
    for other in ({"run_seed": 4}, {"iteration": 2}, {"steps": 2}):
        with pytest.raises(ResumeError, match="expected iteration"):
            train(tmp_path, **other)
    with pytest.raises(ResumeError, match="no average"):
        train(tmp_path, ema_decay=0.9)


def bad_from(first: int, last: int) -> Callable[[int, PairBatch], PairBatch]:
    def damage(step: int, batch: PairBatch) -> PairBatch:
        if first <= step <= last:
            winner = batch.winner.clone()
            winner[7, 0] = math.nan
            return dataclasses.replace(batch, winner=winner)
        return batch

    return damage


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "before", tick=stop_at(2 * 3 + 1))
    policy = TinyPolicy()
    with pytest.raises(Interrupted):
        train(tmp_path, policy=policy, loader=TinyLoader(10, damage=bad_from(2, 3)), tick=stop_at(4 * 3 + 1))
    before = json.loads((tmp_path / "before/checkpoints/checkpoint-000001/state.json").read_text())
    assert before["step"] == 2
    after = policy.weights.state("current")
    policy = TinyPolicy()
    with pytest.raises(Interrupted):
        train(tmp_path / "twice", policy=policy, tick=stop_at(2 * 3 + 1))
    assert_same(after, policy.weights.state("current"))
    log = lines(tmp_path)
    assert [line["train/skipped_steps"] for line in log] == [0, 0, 1, 2]
    assert log[2]["train/loss"] is None and log[2]["train/grad_norm"] is None
    _, report = train(tmp_path, loader=TinyLoader(10, damage=bad_from(2, 3)))
    assert report.skipped_steps == 2 and all(math.isfinite(value) for value in report.metrics().values())


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_pairs(tmp_path: Path) -> None:
    loader = TinyLoader(10, damage=bad_from(1, 7))
    with pytest.raises(TrainingError, match=r"iteration 1, step 4: 3 steps in a row.*pair-3-0, pair-3-1"):
        train(tmp_path, loader=loader, max_bad_steps=3)
    _, report = train(
        tmp_path / "not in a row", loader=TinyLoader(10, damage=bad_from(1, 2)), max_bad_steps=3
    )
    assert report.skipped_steps == 2


def test_bad_steps_of_a_float16_model_name_its_precision(tmp_path: Path) -> None:
    policy = TinyPolicy()
    policy.dtype = torch.float16
    with pytest.raises(TrainingError, match="set model.dtype=bfloat16 or float32"):
        train(tmp_path, policy=policy, loader=TinyLoader(10, damage=bad_from(1, 7)), max_bad_steps=3)


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is(tmp_path: Path) -> None:
    class Root(TinyDpo):
        def loss(self, policy: TinyPolicy, batch: PairBatch, noise_key: tuple) -> LossOutput:
            output = super().loss(policy, batch, noise_key)
            if noise_key[-1] != 2:
                return output
            zero = next(iter(policy.weights.trainable().values())).flatten()[0] * 0.0
            return LossOutput(output.loss + zero.abs().sqrt(), output.metrics)

    _, report = train(tmp_path, algorithm=Root())
    assert report.skipped_steps == 1
    assert math.isfinite(lines(tmp_path)[2]["train/loss"]) and lines(tmp_path)[2]["train/grad_norm"] is None


def test_half_precision_starts_at_ln_2_and_learns(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        _, report = train(tmp_path / precision, mixed_precision=precision, steps=12)
        log = lines(tmp_path / precision)
        assert log[0]["train/loss"] == pytest.approx(LN2, abs=1e-3)
        assert log[report.skipped_steps]["train/grad_norm"] == pytest.approx(_first_norm(tmp_path), rel=0.2)
        assert log[-1]["train/loss"] < LN2
    log, scale = lines(tmp_path / "fp16"), 65536.0
    for line in log:
        assert line["train/loss_scale"] == scale
        # An overflow is answered by half the scale, and is no sign of trouble.
        scale /= 2.0 if line["train/grad_norm"] is None else 1.0
    assert scale < 65536.0


def _first_norm(folder: Path) -> float:
    if not (folder / "full").exists():
        train(folder / "full", steps=1)
    return lines(folder / "full")[0]["train/grad_norm"]


def test_a_full_disk_while_saving_is_a_clear_error_and_the_run_continues_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    expected, _ = train(tmp_path / "whole")
    real = os.fsync

    def full(descriptor: int) -> None:
        if (tmp_path / "run/checkpoints/checkpoint-000001").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiffexpoError, match="No space left"):
            train(tmp_path / "run")
    weights, report = train(tmp_path / "run")
    assert report.resumed_from == 3
    assert_same(weights, expected)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


class TinyMarked(TinyDpo):
    """Has a metric of the first row of each micro-batch, and one of rows that no batch has."""

    def loss(self, policy: TinyPolicy, batch: PairBatch, noise_key: tuple[str | int, ...]) -> LossOutput:
        output = super().loss(policy, batch, noise_key)
        value = torch.full((len(batch),), 2.0)
        chosen = torch.tensor([batch.keys[0] == key for key in batch.keys])
        marked = as_metrics({"train/first": (value, chosen), "train/none": (value, torch.zeros_like(chosen))})
        return dataclasses.replace(output, metrics=output.metrics | marked)


def test_a_metric_of_chosen_rows_is_their_mean_and_absent_where_there_are_none(tmp_path: Path) -> None:
    train(tmp_path, algorithm=TinyMarked(), steps=2)
    steps = [line for line in lines(tmp_path) if "train/lr" in line]
    assert len(steps) == 2
    for line in steps:
        assert line["train/first"] == 2.0 and "train/none" not in line


class TinyFollowed(TinyDpo):
    """Measured against an old policy that follows by a rate that depends on the step."""

    settings = DiffusionNftConfig(kl_weight=0.1)

    def __init__(self) -> None:
        self.steps: list[int] = []

    def loss(self, policy: TinyPolicy, batch: PairBatch, noise_key: tuple[str | int, ...]) -> LossOutput:
        output = super().loss(policy, batch, noise_key)
        with torch.no_grad(), policy.weights.use("old"):
            old = policy.predict(batch.winner, torch.zeros(len(batch)), batch.conditioning)
        now = policy.predict(batch.winner, torch.zeros(len(batch)), batch.conditioning)
        return dataclasses.replace(output, loss=output.loss + (now - old).square().mean())

    def after_step(self, policy: TinyPolicy, step: int) -> None:
        self.steps.append(step)
        rate = 1 / (1 + step)
        old, current = (policy.weights.state(name) for name in ("old", "current"))
        policy.weights.load("old", {name: old[name].lerp(current[name], rate) for name in old})


def test_the_old_policy_starts_as_the_current_one_and_moves_after_each_step(tmp_path: Path) -> None:
    policy, algorithm = TinyPolicy(), TinyFollowed()
    with torch.no_grad():
        policy.module[0].bias.add_(0.3)
    policy.weights.copy("current", "reference")
    start = policy.weights.state("current")
    train(tmp_path, policy=policy, algorithm=algorithm, steps=1)
    current, old = policy.weights.state("current"), policy.weights.state("old")
    assert algorithm.steps == [1]
    for name, value in old.items():
        assert torch.equal(value, start[name].lerp(current[name], 0.5))
        assert not torch.equal(value, current[name])


def test_stopped_anywhere_the_old_policy_goes_on_too(tmp_path: Path) -> None:
    policy, algorithm = TinyPolicy(), TinyFollowed()
    expected, _ = train(tmp_path / "whole", policy=policy, algorithm=algorithm)
    expected_old = policy.weights.state("old")
    assert algorithm.steps == list(range(1, STEPS + 1))
    for ticks in (1, 4, 11, 24):
        with pytest.raises(Interrupted):
            train(tmp_path / str(ticks), algorithm=TinyFollowed(), tick=stop_at(ticks))
        policy = TinyPolicy()
        weights, _ = train(tmp_path / str(ticks), policy=policy, algorithm=TinyFollowed())
        assert_same(weights, expected)
        assert_same(policy.weights.state("old"), expected_old)
        assert lines(tmp_path / str(ticks)) == lines(tmp_path / "whole")


def test_a_checkpoint_without_the_old_policy_is_refused_by_a_method_that_needs_it(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, tick=stop_at(14))
    with pytest.raises(ResumeError, match="no version 'old'"):
        train(tmp_path, algorithm=TinyFollowed())


def test_nothing_follows_a_step_that_was_not_finite(tmp_path: Path) -> None:
    def damage(step: int, batch: PairBatch) -> PairBatch:
        return dataclasses.replace(batch, winner=batch.winner * math.nan) if step == 2 else batch

    algorithm = TinyFollowed()
    train(tmp_path, algorithm=algorithm, loader=TinyLoader(10, damage=damage), steps=5)
    assert algorithm.steps == [1, 2, 4, 5]
