"""What must hold exactly between the classes of the methods, on a small policy and one batch.

Bit for bit where both sides are the same computation; else to 1e-12 of the largest slope, in float64: each
slope is a sum over eight rows and a network of 32 units, some hundreds of roundings of 1e-16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffexpo.types import Batch, LossOutput
from tests.unit.algorithms.methods import KEY, PATHS, ROWS, gradients, make, make_batch, make_policy

pytestmark = pytest.mark.usefixtures("float64")
FORWARD = {"empty_prompt_fraction": 0.0}


def run(name: str, policy, batch: Batch, **changes: object) -> tuple[LossOutput, dict[str, Tensor]]:
    output = make(name, policy, **(FORWARD | changes)).loss(policy, batch, KEY)
    return output, gradients(policy, output.loss)


def assert_equal(
    one: tuple[LossOutput, dict[str, Tensor]], other: tuple[LossOutput, dict[str, Tensor]]
) -> None:
    assert torch.equal(one[0].loss, other[0].loss)
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert any(bool((slope != 0).any()) for slope in one[1].values())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(slope.abs().max()) for slope in expected.values())
    assert largest > 0
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=1e-12 * largest)


def negated(slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: -slope for name, slope in slopes.items()}


@pytest.mark.parametrize("kind", PATHS)
def test_spin_is_diffusion_dpo_on_other_pairs_bit_for_bit(kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch("spin", policy)
    assert_equal(run("spin", policy, batch), run("diffusion_dpo", policy, batch))


@pytest.mark.parametrize("kind", PATHS)
def test_rwr_of_equal_weights_is_supervised_fine_tuning_bit_for_bit(kind: str) -> None:
    policy = make_policy(kind)
    batch = replace(make_batch("rwr", policy), weight=torch.ones(ROWS))
    assert_equal(run("rwr", policy, batch), run("sft", policy, replace(batch, weight=None)))


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_nft_at_optimality_one_half_has_no_gradient_on_policy(beta: float, kind: str) -> None:
    policy = make_policy(kind)
    policy.weights.copy("current", "old")
    batch = make_batch("diffusion_nft", policy)
    undecided = replace(batch, advantages=torch.zeros(ROWS))
    output, slopes = run("diffusion_nft", policy, undecided, beta=beta, kl_weight=0.0)
    assert all(bool((slope == 0).all()) for slope in slopes.values())
    assert float(output.metrics["train/optimality"][0]) == ROWS / 2
    # Advantages turned round turn the gradient round.
    turned = replace(batch, advantages=-batch.advantages)
    one, other = (run("diffusion_nft", policy, b, beta=beta, kl_weight=0.0)[1] for b in (batch, turned))
    assert_close(other, negated(one))


@pytest.mark.parametrize("kind", PATHS)
def test_awm_on_policy_is_supervised_fine_tuning_weighted_by_advantages(kind: str) -> None:
    policy = make_policy(kind)
    policy.weights.copy("current", "old")
    batch = make_batch("awm", policy)
    output, slopes = run("awm", policy, batch, kl_weight=0.0, weighting="uniform")
    assert float(output.loss.detach()) == pytest.approx(-float(batch.advantages.mean()), abs=1e-14)
    _, weighted = run("sft", policy, replace(batch, weight=batch.advantages))
    assert_close(slopes, weighted)


@pytest.mark.parametrize("kind", PATHS)
def test_kto_with_labels_turned_round_and_no_baseline_has_the_negative_gradient_at_the_start(
    kind: str,
) -> None:
    policy = make_policy(kind, moved=False)
    batch = replace(make_batch("diffusion_kto", policy), measured=0.0)
    turned = replace(batch, desirable=~batch.desirable)
    one, other = (run("diffusion_kto", policy, b)[1] for b in (batch, turned))
    assert_close(other, negated(one))


@pytest.mark.parametrize("kind", PATHS)
def test_winner_and_loser_swapped_negate_the_gradient_at_the_start(kind: str) -> None:
    policy = make_policy(kind, moved=False)
    batch = make_batch("diffusion_dpo", policy)
    swapped = replace(batch, winner=batch.loser, loser=batch.winner)
    one, other = (run("diffusion_dpo", policy, b)[1] for b in (batch, swapped))
    assert_close(other, negated(one))
