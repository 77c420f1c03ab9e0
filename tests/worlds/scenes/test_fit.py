"""A training that is stopped and taken up again ends with the bits of one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from worlds.scenes import fit as fitting
from worlds.scenes.fit import Schedule, Training, fit


def loss_of(module: nn.Linear, step: int) -> Tensor:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()


def made() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


@pytest.mark.parametrize("matrices_of", [None, "weight"])
def test_a_stopped_training_goes_on_bit_for_bit(matrices_of: str | None, tmp_path: Path) -> None:
    schedule = Schedule(steps=9, learning_rate=0.1, warmup=2)
    whole, parts = made(), made()

    def finish(module: nn.Linear, state: Path) -> None:
        fit("toy", module, lambda step: loss_of(module, step), schedule, state, lambda: None, matrices_of)

    finish(whole, tmp_path / "whole")
    training = Training(parts, schedule, tmp_path / "parts", matrices_of)
    assert len(training.optimizers) == (1 if matrices_of is None else 2)
    for step in range(4):
        training.update(loss_of(parts, step))
    training.save()
    other = made()
    finish(other, tmp_path / "parts")
    assert torch.equal(whole.weight, other.weight) and torch.equal(whole.bias, other.bias)
    assert not torch.equal(whole.weight, made().weight)


def test_what_is_kept_is_the_average(tmp_path: Path) -> None:
    module, seen = made(), []
    schedule = Schedule(steps=3, learning_rate=0.1, average=0.5)
    fit(
        "average",
        module,
        lambda step: loss_of(module, step),
        schedule,
        tmp_path / "state",
        lambda: seen.append(module.weight.detach().clone()),
    )
    state = Training(made(), schedule, tmp_path / "state")
    assert torch.equal(seen[-1], state.average["weight"]) and torch.equal(module.weight, seen[-1])
    assert not torch.equal(state.average["weight"], state.parameters["weight"])


def test_the_rate_warms_up_and_falls_to_its_last_share() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10, final=0.02)
    assert schedule.rate(0) == 0.1
    assert max(schedule.rate(step) for step in range(100)) <= 1.0
    assert abs(schedule.rate(99) - 0.02) < 1e-3


def test_a_parameter_that_no_gradient_reaches_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "LEARNING_AFTER", 2)
    parts = nn.ModuleDict({"used": made(), "cut": nn.Linear(3, 1)})
    with pytest.raises(ValueError, match="2 of 4 parameters have not moved, cut.weight for one"):
        fit(
            "toy",
            parts,
            lambda step: loss_of(parts["used"], step) + 0.0 * parts["cut"](torch.ones(3)).sum(),  # type: ignore[arg-type]
            Schedule(steps=3, learning_rate=0.1),
            tmp_path / "state",
            lambda: None,
        )
