"""The start-up check finds each fault it is there for, and nothing else."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diffexpo.errors import TrainingError
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.training.selfcheck import trained_module
from diffexpo.types import Conditioning, LossOutput, PairBatch

from .tiny import LN2, TinyDpo, TinyLoader, TinyPolicy, settings


class LowRank(nn.Module):
    """A frozen layer with a low-rank update whose up matrix starts at 0, named as peft names it."""

    def __init__(self, is_bound: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(7, 4).requires_grad_(False)
        self.to_q = nn.ModuleDict(
            {"lora_A": nn.Linear(7, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)}
        )
        nn.init.zeros_(self.to_q["lora_B"].weight)
        self.is_bound = is_bound
        if not is_bound:
            self.other = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_bound:
            return self.base(x) + self.other(x)
        return self.base(x) + self.to_q["lora_B"](self.to_q["lora_A"](x))


def check(tmp_path: Path, policy: TinyPolicy, algorithm: TinyDpo | None = None, **changes: object) -> None:
    """One step of an iteration with its checks."""
    loader = changes.pop("loader", TinyLoader(10))
    named = {"initial_loss": changes.pop("initial_loss", LN2)}
    starts_apart = changes.pop("starts_apart", False)
    engine = Engine(
        policy, algorithm or TinyDpo(), settings(**changes), MetricsWriter(tmp_path / "m.jsonl"), **named
    )
    given = {"checkpoint_dir": tmp_path / "c", "run_seed": 0, "starts_apart": starts_apart}
    engine.train_iteration(1, loader, steps=1, **given)


class Counting(TinyPolicy):
    """Counts rows of every forward."""

    rows = 0

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.rows += len(x_t)
        return super().predict(x_t, t, conditioning)


def moved() -> TinyPolicy:
    """A policy far from its reference."""
    policy = Counting()
    with torch.no_grad():
        policy.module[0].bias += 1.0
    return policy


def test_a_sound_policy_passes_and_the_check_costs_no_forward(tmp_path: Path) -> None:
    policy = Counting()
    check(tmp_path, policy)
    assert policy.rows == 10 * 4  # winners and losers under policy and reference, as any step
    assert all(parameter.grad is None for parameter in policy.weights.trainable().values())


@pytest.mark.parametrize("starts_apart", [True, False])
def test_a_refused_start_leaves_the_weights_as_they_were(tmp_path: Path, starts_apart: bool) -> None:
    policy = moved() if starts_apart else Counting()
    before = policy.weights.state("current")
    with pytest.raises(TrainingError, match=r"loss is 0\.69.*expected 1\.0"):
        check(tmp_path, policy, initial_loss=1.0, starts_apart=starts_apart)
    after = policy.weights.state("current")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_reference_that_is_another_model_than_the_policy_is_found(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="margin is .*expected 0: the reference is not the model"):
        check(tmp_path, moved())


def test_a_first_step_that_is_not_finite_leaves_the_check_to_the_next(tmp_path: Path) -> None:
    def damage(step: int, batch: PairBatch) -> PairBatch:
        return PairBatch(
            batch.winner * (math.nan if step == 0 else 1), batch.loser, batch.conditioning, batch.keys
        )

    def train(policy: TinyPolicy, folder: Path) -> None:
        engine = Engine(policy, TinyDpo(), settings(), MetricsWriter(folder / "m.jsonl"), initial_loss=LN2)
        loader = TinyLoader(10, damage=damage)
        engine.train_iteration(1, loader, steps=2, checkpoint_dir=folder / "c", run_seed=0)

    train(TinyPolicy(), tmp_path / "sound")
    policy = moved()
    before = policy.weights.state("current")
    with pytest.raises(TrainingError, match="margin is .*expected 0"):
        train(policy, tmp_path / "wrong")
    assert all(torch.equal(value, before[name]) for name, value in policy.weights.state("current").items())


def test_a_policy_far_from_its_reference_is_checked_against_itself(tmp_path: Path) -> None:
    policy = moved()
    check(tmp_path, policy, starts_apart=True)
    assert policy.rows == (10 + 4) * 4  # four pairs more, without gradient


def test_a_fresh_low_rank_update_passes_though_its_down_matrix_has_gradient_zero(tmp_path: Path) -> None:
    check(tmp_path, TinyPolicy(LowRank()))


def test_a_module_outside_the_forward_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no gradient reaches 1 of 3 trained modules: to_q;"):
        check(tmp_path, TinyPolicy(LowRank(is_bound=False)))


def test_nothing_to_train(tmp_path: Path) -> None:
    policy = TinyPolicy()
    policy.module.requires_grad_(False)
    with pytest.raises(TrainingError, match="0 trainable tensors"):
        check(tmp_path, policy)


def test_winners_equal_to_losers_give_no_gradient(tmp_path: Path) -> None:
    def same(step: int, batch: PairBatch) -> PairBatch:
        return PairBatch(batch.winner, batch.winner, batch.conditioning, batch.keys)

    with pytest.raises(TrainingError, match="no gradient reaches any of the 4 trained modules"):
        check(tmp_path, TinyPolicy(), loader=TinyLoader(10, damage=same))


def test_a_first_micro_batch_that_teaches_nothing_is_no_fault_of_the_run(tmp_path: Path) -> None:
    def first_four_equal(step: int, batch: PairBatch) -> PairBatch:
        loser = torch.cat([batch.winner[:4], batch.loser[4:]])
        return PairBatch(batch.winner, loser, batch.conditioning, batch.keys)

    policy = TinyPolicy()
    check(tmp_path, policy, loader=TinyLoader(10, damage=first_four_equal))
    assert all(parameter.grad is None for parameter in policy.weights.trainable().values())


def test_randomness_in_the_network_is_found(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    with pytest.raises(TrainingError, match="margin is .*expected 0.*dropout"):
        check(tmp_path, TinyPolicy(module))


def test_a_loss_that_is_not_what_it_must_be_is_found(tmp_path: Path) -> None:
    class Doubled(TinyDpo):
        def loss(self, policy: TinyPolicy, batch: PairBatch, noise_key: tuple) -> LossOutput:
            output = super().loss(policy, batch, noise_key)
            return LossOutput(2.0 * output.loss, output.metrics)

    with pytest.raises(TrainingError, match=r"loss is 1\.386.*expected 0\.693"):
        check(tmp_path, TinyPolicy(), Doubled())
    check(tmp_path, TinyPolicy(), Doubled(), initial_loss=2 * math.log(2.0))
    check(tmp_path, TinyPolicy(), Doubled(), initial_loss=None)


def test_low_rank_pairs_share_a_module() -> None:
    names = ["down.0.to_q.lora_A.weight", "down.0.to_q.lora_B.weight", "conv_in.weight", "conv_in.bias"]
    assert [trained_module(name) for name in names] == ["down.0.to_q", "down.0.to_q", *names[2:]]
