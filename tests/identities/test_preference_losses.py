"""What must hold exactly of Diffusion-DPO and EXPO, as functions of numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import (
    diffusion_dpo_loss,
    exploration_bonus,
    expo_loss,
    pair_margin,
    simpo_loss,
)

LN2 = 0.6931471805599453
KINDS = [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("cdpo", 0.1), ("robust", 0.1), ("linear", 0.0)]


def errors(count: int, size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(0.1 + 0.02 * torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype))


def trained(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 156.0, 5000.0])
def test_ln_2_where_policy_is_reference(dtype: torch.dtype, beta: float) -> None:
    winner, loser = errors(2, dtype=dtype)
    for kind, q in [("sigmoid", 0.0), ("cdpo", 0.1), ("robust", 0.0)]:
        loss = diffusion_dpo_loss(winner, loser, winner, loser, beta=beta, kind=kind, label_smoothing=q)
        assert loss.dtype == dtype
        assert [f"{value:.6f}" for value in loss.tolist()] == ["0.693147"] * 6
    exactly = torch.log(torch.tensor(2.0, dtype=dtype))
    assert (diffusion_dpo_loss(winner, loser, winner, loser, beta=beta) == exactly).all()
    assert (diffusion_dpo_loss(winner, loser, winner, loser, beta=beta, kind="hinge") == 1).all()
    assert (diffusion_dpo_loss(winner, loser, winner, loser, beta=beta, kind="ipo") == 0.25).all()
    linear = diffusion_dpo_loss(winner, loser, winner, loser, beta=beta, kind="linear")
    torch.testing.assert_close(linear, torch.full_like(linear, 0.3125), rtol=0, atol=1e-7)
    assert (simpo_loss(winner, winner, beta=beta, gamma=0.0) == exactly).all()
    assert (exploration_bonus(winner, loser, winner, loser, beta=beta) == 0.5).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
def test_expo_at_step_0_is_ln_2_plus_half_alpha(alpha: float) -> None:
    w, l_, e, m = errors(4)
    value = expo_loss(w, l_, w, l_, e, m, e, m, beta=5000.0, alpha=alpha)
    assert float(value) == pytest.approx(LN2 + alpha / 2, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expo_without_alpha_is_diffusion_dpo_bit_for_bit(dtype: torch.dtype) -> None:
    four = errors(4, dtype=dtype)
    ours, theirs = trained(*four[:2]), trained(*four[:2])
    before = torch.get_rng_state()
    loss = expo_loss(*ours, *four[2:], None, None, None, None, beta=5000.0, alpha=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    expected = diffusion_dpo_loss(*theirs, *four[2:], beta=5000.0).mean()
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_expo_without_alpha_leaves_the_exploration_arguments_untouched() -> None:
    w, l_, wr, lr, e, m = trained(*errors(6))
    loss = expo_loss(w, l_, wr, lr, e, m, e, m, beta=100.0, alpha=0.0)
    assert torch.equal(loss, expo_loss(w, l_, wr, lr, None, None, None, None, beta=100.0, alpha=0.0))
    loss.backward()
    assert e.grad is None and m.grad is None


def test_swapping_winner_and_loser_negates_the_margin_and_at_0_the_gradient() -> None:
    w, l_, wr, lr = errors(4)
    assert torch.equal(pair_margin(w, l_, wr, lr, beta=90.0), -pair_margin(l_, w, lr, wr, beta=90.0))
    for kind, q in KINDS:
        settings = {"beta": 90.0, "kind": kind, "label_smoothing": q}
        first, second = trained(w, l_), trained(w, l_)
        diffusion_dpo_loss(*first, w, l_, **settings).sum().backward()
        diffusion_dpo_loss(*reversed(second), l_, w, **settings).sum().backward()
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.grad, -other.grad), kind
        assert torch.equal(first[0].grad, -first[1].grad), kind
        assert (first[0].grad > 0).all(), f"{kind}: descent must lower the winner's error"


def test_the_slope_of_linear_is_clamped_and_the_loss_has_no_jump() -> None:
    zeros = torch.zeros(9, dtype=torch.float64)
    z = torch.tensor([-1e5, -3.0, -1.25, -1.0, 0.0, 0.5, 1.25, 2.0, 1e5], dtype=torch.float64)
    loser = z.clone().requires_grad_()  # beta 2: the logit is the loser's error
    loss = diffusion_dpo_loss(zeros, loser, zeros, zeros, beta=2.0, kind="linear")
    loss.sum().backward()
    torch.testing.assert_close(loser.grad, -(0.5 - 0.4 * z).clamp(0, 1), rtol=0, atol=1e-15)
    expected = [1e5, 3.0, 1.25, 1.0125, 0.3125, 0.1125, 0.0, 0.0, 0.0]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_bonus_is_antisymmetric() -> None:
    e, m, er, mr = errors(4)
    here, there = trained(e, m), trained(e, m)
    bonus = exploration_bonus(*here, er, mr, beta=90.0)
    swapped = exploration_bonus(*reversed(there), mr, er, beta=90.0)
    torch.testing.assert_close(bonus + swapped, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-15)
    bonus.sum().backward()
    swapped.sum().backward()
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.grad, -other.grad, rtol=1e-12, atol=0)


def test_the_bonuss_gradient_is_optimism_and_limits_itself() -> None:
    alpha, beta = 0.3, 90.0
    e, m = trained(*errors(2))
    er, mr = errors(2, seed=1)
    h = pair_margin(e, m, er, mr, beta=beta).detach()
    (alpha * exploration_bonus(e, m, er, mr, beta=beta)).sum().backward()
    slope = alpha * beta / 2 * torch.sigmoid(h) * torch.sigmoid(-h)
    torch.testing.assert_close(e.grad, slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(m.grad, -slope, rtol=1e-12, atol=0)
    assert (e.grad <= alpha * beta / 8).all()
    with torch.no_grad():
        after = pair_margin(e - 1e-4 * e.grad, m - 1e-4 * m.grad, er, mr, beta=beta)
    assert (after > h).all(), "one step down the bonus must raise the predicted lead of exploration"


def overlapping(h: float, alpha: float, beta: float = 50.0) -> float:
    """dL/dh for one labelled pair whose winner is the main sample and whose loser is the exploration sample."""
    margin = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    gap = (-2 / beta * margin).reshape(1)  # winner minus loser error, the reference's being 0
    loss = expo_loss(gap, zero, zero, zero, zero, gap, zero, zero, beta=beta, alpha=alpha)
    loss.backward()
    return float(margin.grad)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_alpha_up_to_1_never_reverses_a_label(alpha: float) -> None:
    for h in [x / 2 for x in range(-30, 31)]:
        slope = overlapping(h, alpha)
        s = 1 / (1 + math.exp(-h))
        assert slope == pytest.approx(-(1 - s) * (1 - alpha * s), rel=1e-9, abs=1e-15)
        assert slope < 0


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0])
def test_alpha_above_1_stalls_the_margin(alpha: float) -> None:
    stall = -math.log(alpha - 1)
    assert overlapping(stall, alpha) == pytest.approx(0, abs=1e-12)
    assert overlapping(stall - 0.1, alpha) < 0 < overlapping(stall + 0.1, alpha)


def test_beta_explore() -> None:
    eight = errors(8)
    matched = expo_loss(*eight, beta=100.0, alpha=0.5)
    assert torch.equal(matched, expo_loss(*eight, beta=100.0, alpha=0.5, beta_explore=100.0))
    # The bonus knows beta only times errors: a thousandth of beta is a thousandth of every error gap.
    plain = diffusion_dpo_loss(*eight[:4], beta=100.0).mean()
    literal = expo_loss(*eight, beta=100.0, alpha=0.5, beta_explore=0.1) - plain
    small = exploration_bonus(*(value / 1000 for value in eight[4:]), beta=100.0).mean()
    torch.testing.assert_close(literal, 0.5 * small, rtol=1e-12, atol=0)
    # And scaling both betas is scaling every error.
    both = expo_loss(*eight, beta=300.0, alpha=0.5, beta_explore=300.0)
    torch.testing.assert_close(both, expo_loss(*(3 * value for value in eight), beta=100.0, alpha=0.5))


def test_no_gradient_reaches_the_reference() -> None:
    eight = trained(*errors(8))
    expo_loss(*eight, beta=100.0, alpha=0.5).backward()
    assert [value.grad is None for value in eight] == [False, False, True, True] * 2
    for kind, q in KINDS:
        four = trained(*errors(4))
        diffusion_dpo_loss(*four, beta=100.0, kind=kind, label_smoothing=q).sum().backward()
        assert [value.grad is None for value in four] == [False, False, True, True], kind


@pytest.mark.parametrize("gap", [-10.0, 10.0])
def test_finite_for_huge_margins_in_float32(gap: float) -> None:
    zero = torch.zeros(2)
    for kind, q in KINDS:
        w, l_ = trained(torch.full((2,), 10.0 + gap), torch.full((2,), 10.0))
        h = pair_margin(w, l_, zero, zero, beta=5000.0)
        assert (h.abs() > 1e4).all()
        loss = diffusion_dpo_loss(w, l_, zero, zero, beta=5000.0, kind=kind, label_smoothing=q)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(w.grad).all() and torch.isfinite(l_.grad).all()
    e, m = trained(torch.full((2,), 10.0 + gap), torch.full((2,), 10.0))
    bonus = exploration_bonus(e, m, zero, zero, beta=5000.0)
    bonus.sum().backward()
    assert torch.isfinite(bonus).all() and torch.isfinite(e.grad).all() and torch.isfinite(m.grad).all()
    w, l_ = trained(torch.full((2,), 10.0 + gap), torch.full((2,), 10.0))
    simpo_loss(w, l_, beta=5000.0, gamma=0.5).sum().backward()
    assert torch.isfinite(w.grad).all()


def test_tiny_errors_keep_their_difference_in_float32() -> None:
    small = [torch.tensor([value], dtype=torch.float64) for value in (1e-8, 3e-8, 2e-8, 1.5e-8)]
    single = [value.float() for value in small]
    for beta in (5000.0, 1e8):
        truth = pair_margin(*small, beta=beta)
        torch.testing.assert_close(pair_margin(*single, beta=beta).double(), truth, rtol=1e-6, atol=0)
        w, l_ = trained(*single[:2])
        loss = diffusion_dpo_loss(w, l_, *single[2:], beta=beta)
        loss.sum().backward()
        torch.testing.assert_close(
            loss.double(), diffusion_dpo_loss(*small, beta=beta), rtol=1e-6, atol=1e-7, check_dtype=False
        )
        assert float(w.grad) == pytest.approx(beta / 2 * float(torch.sigmoid(-truth)), rel=1e-5)


def test_the_variants_meet_where_they_should() -> None:
    four = errors(4)
    plain = diffusion_dpo_loss(*four, beta=90.0)
    for kind in ("cdpo", "robust"):
        assert torch.equal(diffusion_dpo_loss(*four, beta=90.0, kind=kind), plain)
    # cDPO is the expected loss under flips; robust DPO is unbiased: its expectation is the clean loss.
    w, l_, wr, lr = four
    q = 0.2
    flipped = diffusion_dpo_loss(l_, w, lr, wr, beta=90.0)
    cdpo = diffusion_dpo_loss(*four, beta=90.0, kind="cdpo", label_smoothing=q)
    torch.testing.assert_close(cdpo, (1 - q) * plain + q * flipped, rtol=1e-12, atol=1e-15)
    robust = diffusion_dpo_loss(*four, beta=90.0, kind="robust", label_smoothing=q)
    mirrored = diffusion_dpo_loss(l_, w, lr, wr, beta=90.0, kind="robust", label_smoothing=q)
    torch.testing.assert_close((1 - q) * robust + q * mirrored, plain, rtol=1e-12, atol=1e-15)
    # SimPO is DPO against a reference of equal errors, with gamma for an offset.
    same = torch.zeros_like(w)
    torch.testing.assert_close(
        simpo_loss(w, l_, beta=90.0, gamma=0.7), diffusion_dpo_loss(w, l_, same, same, beta=90.0, offset=0.7)
    )


def test_optimism_lets_the_uncertain_image_win_by_more() -> None:
    w, l_, wr, lr = errors(4)
    gamma_w, gamma_l = torch.full((6,), 0.8), torch.full((6,), 0.3)
    offset = gamma_w - gamma_l
    # -logsigmoid(h - offset) at h is the plain loss at h - offset: fitting the label needs a lead of h + offset.
    needed = pair_margin(w, l_, wr, lr, beta=90.0) - offset
    loss = diffusion_dpo_loss(w, l_, wr, lr, beta=90.0, offset=offset)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-needed), rtol=1e-12, atol=1e-15)
    assert (loss > diffusion_dpo_loss(w, l_, wr, lr, beta=90.0)).all()
    assert (loss > diffusion_dpo_loss(w, l_, wr, lr, beta=90.0, offset=-offset)).all()
