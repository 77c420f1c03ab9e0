"""What must hold exactly of SFT, RWR, SPIN, KTO, MaPO, ORPO, NFT, AWM, DGPO and the safeguards."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.awm import WEIGHTINGS, awm_log_prob, awm_loss
from diffexpo.algorithms.dgpo import dgpo_loss
from diffexpo.algorithms.diffusion_dpo import diffusion_dpo_loss, pair_margin, simpo_loss
from diffexpo.algorithms.diffusion_kto import UTILITIES, diffusion_kto_loss, kto_baseline
from diffexpo.algorithms.diffusion_nft import (
    MODES,
    nft_loss,
    nft_optimality,
    old_policy_decay,
)
from diffexpo.algorithms.mapo import SERIES_BELOW, mapo_loss, mapo_score
from diffexpo.algorithms.orpo import orpo_loss, orpo_margin
from diffexpo.algorithms.rwr import rwr_weights
from diffexpo.algorithms.safeguards import auto_beta, safeguard_scale, safeguarded_loser
from diffexpo.algorithms.sft import sft_loss
from diffexpo.algorithms.spin import spin_loss

LN2 = 0.6931471805599453
LABELS = torch.tensor([True, False, True, False, False, True])


def errors(count: int, size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(0.1 + 0.02 * torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    (leaf,) = trained(at)
    loss(leaf).sum().backward()
    return leaf.grad


# Supervised fine-tuning and reward-weighted regression


def test_sft_is_the_error_and_its_weights_are_shares() -> None:
    (e,) = errors(1)
    assert torch.equal(sft_loss(e), e)
    assert torch.equal(slope(sft_loss, e), torch.ones_like(e))
    weight = torch.tensor([3.0, 0.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    # Weights that sum to B make the batch mean a weighted mean, however many are 0.
    weighted = sft_loss(e, weight)
    torch.testing.assert_close(weighted.mean(), (3 * e[0] + e[2] + 2 * e[4]) / 6)
    assert not weighted.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rwr_weights_sum_to_the_batch_and_know_only_differences(dtype: torch.dtype) -> None:
    r = normal(7).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for temperature in (1e-3, 0.3, 5.0):
        weights = rwr_weights(r, temperature=temperature)
        assert weights.dtype == dtype and (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(7, rel=tolerance)
        moved = rwr_weights(r + 3, temperature=temperature)
        torch.testing.assert_close(moved, weights, rtol=2e-3 if dtype == torch.float32 else 1e-9, atol=0)
        scaled = rwr_weights(4 * r, temperature=4 * temperature)
        torch.testing.assert_close(scaled, weights, rtol=0, atol=0)
    for percentile in (0, 35, 90, 100):
        assert float(rwr_weights(r, kind="sparse", percentile=percentile).sum()) == pytest.approx(7)


def test_rwr_between_sft_and_best_of_n() -> None:
    r, (e,) = normal(6), errors(1)
    assert torch.equal(rwr_weights(r[:4], temperature=math.inf), torch.ones(4, dtype=torch.float64))
    flat = sft_loss(e, rwr_weights(r, temperature=1e12)).mean()
    torch.testing.assert_close(flat, sft_loss(e).mean(), rtol=1e-11, atol=0)
    assert torch.equal(rwr_weights(r, kind="sparse", percentile=0), torch.ones_like(r))
    best = torch.zeros_like(r).index_fill(0, r.argmax(), 6.0)
    torch.testing.assert_close(rwr_weights(r, temperature=1e-4), best, rtol=1e-12, atol=1e-12)
    assert torch.equal(rwr_weights(r, kind="sparse", percentile=100), best)
    torch.testing.assert_close(rwr_weights(torch.full((5,), 0.4), temperature=0.2), torch.ones(5))


def test_sparse_weights_keep_the_upper_part_and_give_its_mean() -> None:
    r = torch.tensor([0.2, 0.9, 0.4, 0.7, 0.9, 0.1, 0.5, 0.3, 0.6, 0.8, 0.0], dtype=torch.float64)
    (e,) = errors(1, size=11)
    weights = rwr_weights(r, kind="sparse", percentile=70)
    kept = torch.tensor([False, True, False, True, True, False, False, False, False, True, False])
    assert torch.equal(weights > 0, kept)
    torch.testing.assert_close(sft_loss(e, weights).mean(), e[kept].mean(), rtol=1e-14, atol=0)
    # Both maxima are kept: a tie is not broken by position.
    assert (rwr_weights(r, kind="sparse", percentile=100) > 0).nonzero().flatten().tolist() == [1, 4]


def test_rwr_survives_rewards_of_any_size() -> None:
    for r in (torch.tensor([1e30, -1e30, 0.0]), torch.tensor([1e-30, 0.0, 2e-30])):
        for settings in ({"temperature": 1e-3}, {"kind": "sparse", "percentile": 90}):
            assert float(rwr_weights(r, **settings).sum()) == pytest.approx(3)


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ([1.0, math.nan], {"temperature": 1.0}, "1 of 2 rewards are not finite"),
        ([], {"temperature": 1.0}, "shape \\(0,\\)"),
        ([1, 2], {"temperature": 1.0}, "int64"),
        ([1.0], {}, "temperature is None"),
        ([1.0], {"temperature": 0.0}, "temperature is 0.0"),
        ([1.0], {"temperature": 1.0, "percentile": 90}, "percentile 90"),
        ([1.0], {"kind": "sparse", "percentile": 101}, "percentile is 101"),
        ([1.0], {"kind": "sparse", "percentile": 90, "temperature": 1.0}, "temperature 1.0"),
        ([1.0], {"kind": "best", "temperature": 1.0}, "'best'"),
    ],
)
def test_rwr_refuses(rewards: list[float], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rwr_weights(torch.tensor(rewards), **settings)


# SPIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spin_is_diffusion_dpo_on_another_pair_bit_for_bit(dtype: torch.dtype) -> None:
    data, generated, *references = errors(4, dtype=dtype)
    ours, theirs = trained(data, generated), trained(data, generated)
    loss = spin_loss(*ours, *references, beta=2000.0)
    expected = diffusion_dpo_loss(*theirs, *references, beta=2000.0)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)
    start = spin_loss(data, generated, data, generated, beta=2000.0)
    assert (start == torch.log(torch.tensor(2.0, dtype=dtype))).all()


# Diffusion-KTO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kto_where_policy_is_reference(dtype: torch.dtype) -> None:
    (e,) = errors(1, dtype=dtype)
    for kind in ("mean", "class_mean"):
        assert float(kto_baseline(e, e, LABELS, kind=kind)) == 0
    truth = {
        "sigmoid": (0.5, 0.5),
        "loss_averse": (1 + LN2, 1 + LN2),
        "risk_seeking_1": (1 - LN2, 1 + LN2),
        "risk_seeking_2": (1.0, 3.0),
        "risk_seeking_3": (1 - LN2, 1 - LN2),
    }
    for utility in UTILITIES:
        loss = diffusion_kto_loss(e, e, LABELS, beta=5000.0, baseline=0.0, utility=utility)
        expected = torch.where(LABELS, *(torch.tensor(value, dtype=dtype) for value in truth[utility]))
        torch.testing.assert_close(loss, expected, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0)
    halves = diffusion_kto_loss(
        e, e, LABELS, beta=1.0, baseline=0.0, desirable_weight=3.0, undesirable_weight=0.2
    )
    one, other = torch.tensor([1.5, 0.1], dtype=dtype)
    assert torch.equal(halves, torch.where(LABELS, one, other))


@pytest.mark.parametrize("utility", UTILITIES)
def test_kto_lowers_the_error_of_desirable_images_and_raises_that_of_others(utility: str) -> None:
    e, er = errors(2)
    for labels, sign in ((torch.ones_like(LABELS), 1), (torch.zeros_like(LABELS), -1)):
        grad = slope(
            lambda x, labels=labels: diffusion_kto_loss(
                x, er, labels, beta=60.0, baseline=0.01, utility=utility
            ),
            e,
        )
        assert (sign * grad > 0).all()


def test_kto_at_the_baseline_has_the_slope_beta_over_4() -> None:
    e, er = errors(2)
    for index in range(len(e)):
        z = er[index] - e[index]
        grad = slope(lambda x, z=z: diffusion_kto_loss(x, er, LABELS, beta=60.0, baseline=z), e)
        assert float(grad[index]) == pytest.approx(15.0 if LABELS[index] else -15.0, rel=1e-12)


def test_kto_flipping_every_label_negates_the_gradient() -> None:
    e, er = errors(2)
    settings = {"beta": 60.0, "baseline": 0.01}
    here = slope(lambda x: diffusion_kto_loss(x, er, LABELS, **settings), e)
    there = slope(lambda x: diffusion_kto_loss(x, er, ~LABELS, **settings), e)
    torch.testing.assert_close(here, -there, rtol=1e-12, atol=0)
    both = diffusion_kto_loss(e, er, LABELS, **settings) + diffusion_kto_loss(e, er, ~LABELS, **settings)
    torch.testing.assert_close(both, torch.ones_like(e), rtol=1e-12, atol=0)


def test_kto_knows_only_the_distance_to_the_baseline() -> None:
    e, er = errors(2)
    for utility in UTILITIES:
        settings = {"beta": 60.0, "utility": utility}
        torch.testing.assert_close(
            diffusion_kto_loss(e, er + 0.03, LABELS, baseline=0.05, **settings),
            diffusion_kto_loss(e, er, LABELS, baseline=0.02, **settings),
            rtol=1e-10,
            atol=0,
        )


def test_kto_baselines() -> None:
    e, er = errors(2)
    g = er - e
    up, down = torch.full_like(e, 0.5), torch.full_like(e, 0.2)
    assert float(kto_baseline(down, up, LABELS)) == pytest.approx(0.3)
    assert float(kto_baseline(up, down, LABELS)) == 0, "the mean estimates a divergence: never negative"
    assert float(kto_baseline(up, down, LABELS, kind="class_mean")) == pytest.approx(-0.3)
    ours = kto_baseline(e, er, LABELS, kind="class_mean")
    torch.testing.assert_close(ours, (g[LABELS].mean() + g[~LABELS].mean()) / 2)
    # A class counts once, whatever its size; one that is absent does not count.
    repeated = torch.cat([torch.arange(6), torch.tensor([1, 3, 4])])
    again = kto_baseline(e[repeated], er[repeated], LABELS[repeated], kind="class_mean")
    torch.testing.assert_close(again, ours, rtol=1e-12, atol=0)
    alone = kto_baseline(e[LABELS], er[LABELS], LABELS[LABELS], kind="class_mean")
    torch.testing.assert_close(alone, g[LABELS].mean())


def test_kto_refuses() -> None:
    e, er = errors(2)
    for labels in (LABELS.long(), LABELS.double()):
        with pytest.raises(ValueError, match="expected torch.bool"):
            diffusion_kto_loss(e, er, labels, beta=1.0, baseline=0.0)
        with pytest.raises(ValueError, match="expected torch.bool"):
            kto_baseline(e, er, labels)
    for wrong in ({"beta": 0.0}, {"utility": "greedy"}, {"desirable_weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            diffusion_kto_loss(e, er, LABELS, **{"beta": 1.0, "baseline": 0.0} | wrong)
    with pytest.raises(ValueError, match="median"):
        kto_baseline(e, er, LABELS, kind="median")
    with pytest.raises(ValueError, match="0 errors"):
        kto_baseline(e[:0], er[:0], LABELS[:0])


# MaPO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.1, 0.5, 3.0])
def test_mapo_score_falls_from_1_to_0(dtype: torch.dtype, shift: float) -> None:
    zero = torch.zeros(3, dtype=dtype)
    assert (mapo_score(zero, shift=shift) == 1).all()
    torch.testing.assert_close(
        slope(lambda e: mapo_score(e, shift=shift), zero),
        torch.full((3,), -shift / 2, dtype=dtype),
        rtol=1e-7,
        atol=0,
    )
    rising = torch.logspace(-2, 0.5, 50, dtype=dtype)
    scores = mapo_score(rising, shift=shift)
    assert (scores.diff() < 0).all() and (scores > 0).all() and (scores < 1).all()
    # Where series and closed form meet, neither value nor slope jumps.
    around = torch.tensor([-1e-6, 1e-6], dtype=dtype) + SERIES_BELOW / shift
    grads = slope(lambda e: mapo_score(e, shift=shift), around)
    step = 3e-5 if dtype == torch.float32 else 3e-6
    assert abs(float(mapo_score(around, shift=shift).diff())) < step
    torch.testing.assert_close(grads[0], grads[1], rtol=step, atol=0)


def test_mapo_of_equal_errors_and_of_small_ones() -> None:
    w, l_ = errors(2)
    torch.testing.assert_close(mapo_loss(w, w, beta=0.1), w + 0.1 * LN2, rtol=1e-15, atol=0)
    # Small errors: the margin is that of SimPO with beta = T s, ten times weaker than Diffusion-DPO at 5000.
    for scale in (1e-2, 1e-4, 1e-6):
        small = mapo_loss(scale * w, scale * l_, beta=0.1) - scale * w
        limit = 0.1 * simpo_loss(scale * w, scale * l_, beta=500.0, gamma=0.0)
        # The next term of phi is (s e)^2 / 12: 1000 of it at errors up to 0.2 scale, slope at most beta.
        torch.testing.assert_close(small, limit, rtol=0, atol=0.1 * 1000 * (0.1 * scale) ** 2 / 12)
    # A loser of huge error has score 0: nothing is left to gain from it.
    lost = mapo_loss(w, torch.full_like(w, 1e3), beta=0.1)
    torch.testing.assert_close(lost, w - 0.1 * logsigmoid(1000 * mapo_score(w)), rtol=1e-12, atol=0)


def test_mapo_swapping_winner_and_loser_negates_the_margin() -> None:
    w, l_ = errors(2)

    def odds(winner: Tensor, loser: Tensor) -> Tensor:
        """-log(p / (1 - p)) = -z, from the losses -log p and -log(1 - p) of the two orders of one pair."""
        return (mapo_loss(winner, loser, beta=1.0) - winner) - (mapo_loss(loser, winner, beta=1.0) - loser)

    torch.testing.assert_close(odds(w, l_), -odds(l_, w), rtol=1e-12, atol=0)
    torch.testing.assert_close(odds(w, l_), 1000 * (mapo_score(l_) - mapo_score(w)), rtol=1e-9, atol=1e-9)
    # At equal errors the two slopes of the margin cancel; the winner has its own error besides.
    winner, loser = trained(w, w)
    mapo_loss(winner, loser, beta=0.1).sum().backward()
    torch.testing.assert_close(winner.grad - 1, -loser.grad, rtol=1e-10, atol=0)
    assert (loser.grad < 0).all()


def test_mapo_keeps_the_margin_of_tiny_errors_in_float32() -> None:
    for scale in (1e-1, 1e-4, 1e-8):
        w, l_ = errors(2)
        w, l_ = 10 * scale * w, 10 * scale * l_
        # Times a large T, so that the margin rules the loss.
        steps = round(1000 / scale)
        truth = mapo_loss(w, l_, beta=1.0, num_train_timesteps=steps)
        single = mapo_loss(w.float(), l_.float(), beta=1.0, num_train_timesteps=steps)
        torch.testing.assert_close(single.double(), truth, rtol=1e-3, atol=1e-3)


def test_mapo_refuses() -> None:
    w, l_ = errors(2)
    for wrong in ({"beta": 0.0}, {"num_train_timesteps": 0}, {"shift": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mapo_loss(w, l_, **{"beta": 0.1} | wrong)


# ORPO


def test_orpo_of_equal_errors_and_its_check_value() -> None:
    w, l_ = errors(2)
    for beta in (1e-3, 1.0, 5000.0):
        torch.testing.assert_close(
            orpo_loss(w, w, beta=beta, weight=0.1), sft_loss(w) + 0.1 * LN2, rtol=1e-15, atol=0
        )
    single = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert float(orpo_loss(single[:1], single[1:], beta=1.0, weight=0.1)) == pytest.approx(
        0.1388672, abs=5e-8
    )
    assert orpo_loss(w, l_, beta=1.0, weight=0.1).dtype == torch.float64


@pytest.mark.parametrize("beta", [1e-2, 1.0, 30.0])
def test_orpo_lowers_the_winners_error_and_raises_the_losers(beta: float) -> None:
    w, l_ = errors(2)
    for first, second in ((w, l_), (l_, w), (w, w)):
        winner, loser = trained(first, second)
        orpo_loss(winner, loser, beta=beta, weight=0.1).sum().backward()
        # By finite differences, in the direction in which a step goes.
        step = 1e-6
        for leaf, moved in ((winner, (first + step, second)), (loser, (first, second + step))):
            back = tuple(2 * at - to for at, to in zip((first, second), moved, strict=True))
            rise = orpo_loss(*moved, beta=beta, weight=0.1) - orpo_loss(*back, beta=beta, weight=0.1)
            torch.testing.assert_close(leaf.grad, rise / (2 * step), rtol=1e-6, atol=1e-8)
        assert (winner.grad > 1).all() and (loser.grad < 0).all()


def test_orpo_swapping_winner_and_loser_negates_the_margin_and_its_gradient() -> None:
    w, l_ = errors(2)

    def odds_part(winner: Tensor, loser: Tensor) -> Tensor:
        return orpo_loss(winner, loser, beta=2.0, weight=1.0) - winner

    margin = orpo_margin(w, l_, beta=2.0)
    torch.testing.assert_close(orpo_margin(l_, w, beta=2.0), -margin, rtol=1e-13, atol=0)
    torch.testing.assert_close(odds_part(l_, w) - odds_part(w, l_), margin, rtol=1e-12, atol=0)
    # Of equal errors the two slopes of the odds-ratio part cancel.
    winner, loser = trained(w, w)
    odds_part(winner, loser).sum().backward()
    torch.testing.assert_close(winner.grad, -loser.grad, rtol=1e-12, atol=0)
    # The slopes of both orders add up to the margin's own, with opposite signs.
    one, other = trained(w, l_), trained(l_, w)
    odds_part(*one).sum().backward()
    odds_part(*other).sum().backward()
    whole = slope(lambda e: orpo_margin(e, l_, beta=2.0), w)
    torch.testing.assert_close(other[1].grad - one[0].grad, whole, rtol=1e-12, atol=0)


def test_orpo_margin_of_small_and_of_large_errors() -> None:
    w, l_ = errors(2)
    small = orpo_margin(1e-9 * w, 1e-9 * l_, beta=1.0)
    torch.testing.assert_close(small, torch.log(l_ / w), rtol=1e-8, atol=1e-10)
    large = orpo_margin(w, l_, beta=5000.0)
    torch.testing.assert_close(large, 5000 * (l_ - w), rtol=1e-12, atol=0)
    # Then the loss is that of SimPO with twice the beta, beside the winner's error.
    limit = w + 0.1 * simpo_loss(w, l_, beta=10000.0, gamma=0.0)
    torch.testing.assert_close(orpo_loss(w, l_, beta=5000.0, weight=0.1), limit, rtol=1e-12, atol=0)


def test_orpo_keeps_the_margin_in_float32_and_counts_an_error_of_0_as_rounding() -> None:
    for scale in (1e-10, 1e-4, 1.0, 1e5):
        w, l_ = errors(2)
        w, l_ = (scale * error for error in (w, l_))
        single = orpo_margin(w.float(), l_.float(), beta=1.0).double()
        torch.testing.assert_close(single, orpo_margin(w, l_, beta=1.0), rtol=1e-4, atol=1e-5)
    zero, one = torch.zeros(1), torch.ones(1)
    assert float(orpo_margin(zero, zero, beta=1.0)) == 0
    assert float(orpo_margin(zero, one, beta=1.0)) > 30 and float(orpo_margin(one, zero, beta=1.0)) < -30


def test_orpo_refuses() -> None:
    w, l_ = errors(2)
    for wrong in ({"beta": 0.0}, {"beta": -1.0}, {"weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            orpo_loss(w, l_, **{"beta": 1.0, "weight": 0.1} | wrong)


# DiffusionNFT


def flow_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, old, x0, eps = normal(4, 5, 2, 3, 3, seed=seed)
    t = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    wide = t.reshape(-1, 1, 1, 1)
    return v, old, x0, (1 - wide) * x0 + wide * eps, t


def normalised(v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of x0 over its mean absolute error, the latter held."""
    difference = (x_t - t.reshape(-1, 1, 1, 1) * v - x0).flatten(1)
    return difference.square().mean(1) / difference.detach().abs().mean(1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_on_policy_is_supervised_with_the_weight_2r_minus_1(beta: float) -> None:
    _, old, x0, x_t, t = flow_batch()
    plain = slope(lambda v: normalised(v, x0, x_t, t), old)
    for r in (torch.zeros(5), torch.full((5,), 0.25), torch.ones(5), torch.linspace(0, 1, 5)):
        r = r.double()
        loss = nft_loss(old, old, x0, x_t, t, r, beta=beta)
        torch.testing.assert_close(loss, normalised(old, x0, x_t, t) / beta, rtol=1e-12, atol=0)
        grad = slope(lambda v, r=r: nft_loss(v, old, x0, x_t, t, r, beta=beta), old)
        torch.testing.assert_close(grad, (2 * r - 1).reshape(-1, 1, 1, 1) * plain, rtol=1e-10, atol=1e-15)
    half = slope(lambda v: nft_loss(v, old, x0, x_t, t, torch.full((5,), 0.5), beta=beta), old)
    assert torch.equal(half, torch.zeros_like(half)), "an average sample teaches nothing on-policy"


def test_nft_reflecting_the_policy_in_the_old_one_swaps_r() -> None:
    v, old, x0, x_t, t = flow_batch()
    r = torch.linspace(0, 1, 5, dtype=torch.float64)
    here = nft_loss(v, old, x0, x_t, t, r, beta=0.7)
    there = nft_loss(2 * old - v, old, x0, x_t, t, 1 - r, beta=0.7)
    torch.testing.assert_close(here, there, rtol=1e-12, atol=0)
    half = torch.full((5,), 0.5, dtype=torch.float64)
    grad = slope(lambda x: nft_loss(x, old, x0, x_t, t, half, beta=0.7), v)
    mirrored = slope(lambda x: nft_loss(x, old, x0, x_t, t, half, beta=0.7), 2 * old - v)
    torch.testing.assert_close(grad, -mirrored, rtol=1e-10, atol=1e-14)


def test_nft_with_beta_1_and_r_1_is_supervised_wherever_the_policy_is() -> None:
    v, old, x0, x_t, t = flow_batch()
    ones = torch.ones(5, dtype=torch.float64)
    ours, theirs = trained(v, v)
    loss, expected = nft_loss(ours, old, x0, x_t, t, ones, beta=1.0), normalised(theirs, x0, x_t, t)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-15)


def test_nft_of_a_policy_that_knows_the_sample() -> None:
    _, _, x0, x_t, t = flow_batch()
    v = (x_t - x0) / t.reshape(-1, 1, 1, 1)
    loss = nft_loss(v, v, x0, x_t, t, torch.full((5,), 0.7), beta=0.1)
    grad = slope(lambda x: nft_loss(x, v, x0, x_t, t, torch.full((5,), 0.7), beta=0.1), v)
    assert (loss < 1e-25).all() and (grad.abs() < 1e-10).all()


def test_nft_optimality_and_its_modes() -> None:
    advantages = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    expected = {
        "all": [0.0, 0.0, 0.4, 0.5, 0.7, 1.0, 1.0],
        "positive_only": [0.5, 0.5, 0.5, 0.5, 0.7, 1.0, 1.0],
        "negative_only": [0.0, 0.0, 0.4, 0.5, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6],
    }
    for mode in MODES:
        truth = torch.tensor(expected[mode], dtype=torch.float64)
        torch.testing.assert_close(nft_optimality(advantages, mode=mode), truth, rtol=1e-14, atol=1e-15)
    assert (nft_optimality(advantages, clip=0.1, mode="binary") <= 1).all()
    # Better and worse are treated alike.
    for mode in ("all", "binary"):
        both = nft_optimality(advantages, mode=mode) + nft_optimality(-advantages, mode=mode)
        torch.testing.assert_close(both, torch.ones_like(both), rtol=1e-14, atol=0)
    for wrong in ({"clip": 0.0}, {"mode": "best"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            nft_optimality(advantages, **wrong)
    with pytest.raises(ValueError, match="beta is 0"):
        nft_loss(*flow_batch(), torch.ones(5), beta=0.0)


def test_old_policy_decay_schedules() -> None:
    assert [old_policy_decay(step, kind=0) for step in (0, 10, 10_000)] == [0, 0, 0]
    assert [old_policy_decay(step, kind=1) for step in (0, 100, 500, 9999)] == pytest.approx(
        [0, 0.1, 0.5, 0.5]
    )
    steps = (0, 75, 76, 175, 208, 209, 9999)
    assert [old_policy_decay(step, kind=2) for step in steps] == pytest.approx(
        [0, 0, 0.0075, 0.75, 0.9975, 0.999, 0.999]
    )
    for kind in (0, 1, 2):
        kept = [old_policy_decay(step, kind=kind) for step in range(400)]
        assert kept == sorted(kept) and 0 <= kept[0] and kept[-1] < 1
    with pytest.raises(ValueError, match="step is -1"):
        old_policy_decay(-1, kind=1)
    with pytest.raises(ValueError, match="kind is 3"):
        old_policy_decay(1, kind=3)


# Advantage-weighted matching


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_awm_on_policy_is_the_weighted_error_times_the_advantage(weighting: str) -> None:
    (e,), advantage, t = errors(1), normal(6), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    settings = {"clip_range": 1e-4, "weighting": weighting}
    assert torch.equal(awm_loss(e, e, advantage, t, **settings), -advantage)
    grad = slope(lambda x: awm_loss(x, e, advantage, t, **settings), e)
    matching = slope(lambda x: -awm_log_prob(x, t, weighting=weighting), e)
    assert (matching > 0).all()
    torch.testing.assert_close(grad, advantage * matching, rtol=1e-12, atol=0)
    negated = slope(lambda x: awm_loss(x, e, -advantage, t, **settings), e)
    assert torch.equal(grad, -negated)


def test_awm_ends_the_gradient_beyond_the_clip_and_only_there() -> None:
    old = torch.full((4,), 0.5, dtype=torch.float64)
    e = torch.tensor([0.3, 0.3, 0.7, 0.7], dtype=torch.float64)  # likelier twice, then less likely twice
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    grad = slope(lambda x: awm_loss(x, old, advantage, 0.5, clip_range=0.1), e)
    assert (grad != 0).tolist() == [False, True, True, False]
    torch.testing.assert_close(grad[1:3], (advantage * torch.exp(old - e))[1:3], rtol=1e-12, atol=0)


def test_awm_weightings_are_powers_of_one_another() -> None:
    (e,), t = errors(1), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    plain, in_t = awm_log_prob(e, t), awm_log_prob(e, t, weighting="t")
    assert torch.equal(plain, -e)
    torch.testing.assert_close(in_t, t * plain)
    torch.testing.assert_close(awm_log_prob(e, t, weighting="t_squared"), t * in_t)
    huber = awm_log_prob(e, t, weighting="huber")
    torch.testing.assert_close(awm_log_prob(e, t, weighting="ghuber", power=0.5), 2 * huber)
    torch.testing.assert_close(awm_log_prob(e, t, weighting="ghuber", power=1.0), in_t)
    for weighting in WEIGHTINGS:
        zero = torch.zeros(2, dtype=torch.float64)
        assert (awm_log_prob(zero, 0.7, weighting=weighting).abs() < 1e-15).all()
    # A number is taken in the precision of the errors.
    torch.testing.assert_close(awm_log_prob(e, 0.3, weighting="t"), -0.3 * e, rtol=1e-15, atol=0)


def test_awm_refuses() -> None:
    (e,) = errors(1)
    for wrong in ({"clip_range": 0.0}, {"weighting": "snr"}, {"power": 0.0}, {"power": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            awm_loss(e, e, e, 0.5, **{"clip_range": 0.1} | wrong)


# DGPO


def test_dgpo_of_two_is_diffusion_dpo() -> None:
    w, l_, wr, lr = errors(4)
    pair = torch.arange(6)
    groups, advantage = torch.cat([pair, pair]), torch.cat([torch.ones(6), -torch.ones(6)]).double()
    (both,) = trained(torch.cat([w, l_]))
    ours = dgpo_loss(both, torch.cat([wr, lr]), advantage, groups, beta=90.0)
    winner, loser = trained(w, l_)
    theirs = diffusion_dpo_loss(winner, loser, wr, lr, beta=90.0)
    torch.testing.assert_close(ours, torch.cat([theirs, theirs]), rtol=1e-12, atol=0)
    ours.mean().backward()
    theirs.mean().backward()
    torch.testing.assert_close(both.grad, torch.cat([winner.grad, loser.grad]), rtol=1e-12, atol=0)


GROUPS = torch.tensor([4, 4, 9, 4, 9, 9, 9])
ADVANTAGE = torch.tensor([1.5, -1.0, 0.5, -0.5, 1.0, -2.0, 0.5], dtype=torch.float64)  # sum 0 in both groups


def test_dgpo_where_policy_is_reference() -> None:
    (e,) = errors(1, size=7)
    loss = dgpo_loss(e, e, ADVANTAGE, GROUPS, beta=5000.0)
    assert (loss == torch.log(torch.tensor(2.0, dtype=torch.float64))).all()
    here = slope(lambda x: dgpo_loss(x, e, ADVANTAGE, GROUPS, beta=90.0), e)
    there = slope(lambda x: dgpo_loss(x, e, -ADVANTAGE, GROUPS, beta=90.0), e)
    assert torch.equal(here, -there), "better and worse swapped: the gradient turns round"
    assert torch.equal(here > 0, ADVANTAGE > 0), "descent lowers the error of the better samples"


def test_dgpo_is_a_loss_of_groups() -> None:
    e, er = errors(2, size=7)
    loss = dgpo_loss(e, er, ADVANTAGE, GROUPS, beta=90.0)
    for name in (4, 9):
        of = GROUPS == name
        alone = dgpo_loss(e[of], er[of], ADVANTAGE[of], GROUPS[of], beta=90.0)
        torch.testing.assert_close(loss[of], alone, rtol=1e-12, atol=0)
        assert (loss[of] == loss[of][0]).all()
        # Of sum 0, advantages do not see what all samples of a group have in common.
        common = dgpo_loss(e + 0.3 * of, er, ADVANTAGE, GROUPS, beta=90.0)
        torch.testing.assert_close(common, loss, rtol=1e-9, atol=0)
    order = torch.tensor([6, 2, 0, 5, 3, 1, 4])
    moved = dgpo_loss(e[order], er[order], ADVANTAGE[order], 100 - GROUPS[order], beta=90.0)
    torch.testing.assert_close(moved, loss[order], rtol=1e-12, atol=0)


def test_dgpo_has_the_gradient_of_the_authors_surrogate_times_beta() -> None:
    e, er = errors(2, size=7)
    grad = slope(lambda x: dgpo_loss(x, er, ADVANTAGE, GROUPS, beta=90.0) / len(e), e)
    sums = torch.stack([(ADVANTAGE * (e - er))[GROUPS == name].mean() for name in GROUPS.tolist()])
    surrogate = torch.sigmoid(90.0 * sums) * ADVANTAGE / len(e)
    torch.testing.assert_close(grad, 90.0 * surrogate, rtol=1e-12, atol=0)


def test_dgpo_clip_holds_the_samples_that_have_moved_far_enough() -> None:
    (old,) = errors(1, size=7)
    move = torch.tensor([-0.2, -0.2, 0.2, 0.2, 0.01, 0.01, -0.01], dtype=torch.float64)
    e, er = old + move, old + 0.03
    plain = dgpo_loss(e, er, ADVANTAGE, GROUPS, beta=90.0)
    clipped = {"beta": 90.0, "error_old": old, "clip_range": 0.1}
    assert torch.equal(dgpo_loss(e, er, ADVANTAGE, GROUPS, **clipped), plain)
    free = slope(lambda x: dgpo_loss(x, er, ADVANTAGE, GROUPS, beta=90.0), e)
    held = slope(lambda x: dgpo_loss(x, er, ADVANTAGE, GROUPS, **clipped), e)
    # Better and likelier, worse and less likely; the others moved the wrong way, or little.
    is_held = torch.tensor([True, False, False, True, False, False, False])
    assert torch.equal(held, torch.where(is_held, 0.0, free))


def test_dgpo_refuses() -> None:
    e, er = errors(2, size=7)
    with pytest.raises(ValueError, match="have shapes"):
        dgpo_loss(e, er, ADVANTAGE[:1], GROUPS, beta=1.0)
    for wrong in ({"beta": 0.0}, {"clip_range": 1.0, "error_old": er}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            dgpo_loss(e, er, ADVANTAGE, GROUPS, **{"beta": 1.0} | wrong)
    for half in ({"clip_range": 0.1}, {"error_old": er}):
        with pytest.raises(ValueError, match="is None"):
            dgpo_loss(e, er, ADVANTAGE, GROUPS, beta=1.0, **half)


# Safeguards


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9, 1.0])
def test_the_safeguard_is_the_largest_scale_that_spares_the_winner(mu: float) -> None:
    winner = normal(40, 2, 2, 2)
    loser = 2 * normal(40, 2, 2, 2, seed=1) + winner
    scale = safeguard_scale(winner, loser, mu=mu)
    assert (scale >= 0).all() and (scale <= 1).all()
    w, l_ = winner.flatten(1), loser.flatten(1)
    along = ((scale[:, None] * l_ - w) * w).sum(1)
    bound = -mu * w.square().sum(1)
    assert (along <= bound + 1e-12).all()
    conflict = (w * l_).sum(1) > (1 - mu) * w.square().sum(1)
    assert 0 < conflict.sum() < 40
    torch.testing.assert_close(along[conflict], bound[conflict], rtol=1e-10, atol=1e-10)
    assert (scale[~conflict] == 1).all()


def test_the_safeguards_scale_at_known_angles() -> None:
    g = normal(4, 2, 3, 3)
    for mu in (0.0, 0.3, 1.0):
        torch.testing.assert_close(safeguard_scale(g, g, mu=mu), torch.full((4,), 1 - mu).double())
        assert (safeguard_scale(g, -g, mu=mu) == 1).all()
        assert (safeguard_scale(torch.zeros_like(g), g, mu=mu) == 1).all()
    # A common factor cancels, however small: residuals serve as well as gradients of a mean.
    other = g + normal(4, 2, 3, 3, seed=1)
    expected = safeguard_scale(g, other, mu=0.3)
    torch.testing.assert_close(safeguard_scale(1e-9 * g, 1e-9 * other, mu=0.3), expected, rtol=1e-9, atol=0)


def test_a_safeguarded_step_lowers_the_winners_error_where_the_plain_one_raises_it() -> None:
    """Both images share one output, the worst case of shared weights."""
    start, winner_target = normal(30, 8), normal(30, 8, seed=1)
    loser_target = winner_target + 0.5 * normal(30, 8, seed=2)

    def after_a_step(is_guarded: bool) -> tuple[Tensor, Tensor]:
        (output,) = trained(start)
        winner = (output - winner_target).square().mean(1)
        loser = (output - loser_target).square().mean(1)
        if is_guarded:
            residuals = (start - winner_target, start - loser_target)
            loser = safeguarded_loser(loser, safeguard_scale(*residuals, mu=0.2))
        before = winner.detach()
        diffusion_dpo_loss(winner, loser, before, loser.detach(), beta=10.0).sum().backward()
        moved = start - 1e-4 * output.grad
        return before, (moved - winner_target).square().mean(1)

    before, plain = after_a_step(False)
    assert (plain > before).any(), "the example shows nothing"
    before, guarded = after_a_step(True)
    assert (guarded < before).all()


def test_the_safeguarded_loser_keeps_its_value() -> None:
    (e,) = errors(1, dtype=torch.float32)
    scale = torch.linspace(0, 1, 6)
    assert torch.equal(safeguarded_loser(e, scale), e)
    assert torch.equal(slope(lambda x: safeguarded_loser(x, scale), e), scale)
    w, l_, wr, lr = errors(4)
    plain, guarded = trained(l_, l_)
    loss = diffusion_dpo_loss(w, plain, wr, lr, beta=90.0)
    same = diffusion_dpo_loss(w, safeguarded_loser(guarded, scale.double()), wr, lr, beta=90.0)
    assert torch.equal(loss, same)
    loss.sum().backward()
    same.sum().backward()
    torch.testing.assert_close(guarded.grad, scale.double() * plain.grad, rtol=1e-12, atol=0)


def test_auto_beta_hits_the_target() -> None:
    w, l_, wr, lr = errors(4)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    for target in (0.05, 0.2, 0.45):
        beta = auto_beta(1e-3 * signs, target=target)
        factor = torch.sigmoid(-beta * 1e-3)
        assert float(factor) == pytest.approx(target, rel=1e-12)
        margins = pair_margin(w, l_, wr, lr, beta=1.0)
        beta = float(auto_beta(margins, target=target))
        reached = torch.sigmoid(-pair_margin(w, l_, wr, lr, beta=beta).abs()).mean()
        assert target < float(reached) < 0.5, "Jensen: unequal margins are saturated less than asked"
        # Only the mean size counts, so a running mean of it serves as well.
        assert float(auto_beta(margins.abs().mean(), target=target)) == pytest.approx(beta, rel=1e-12)
        assert float(auto_beta(7 * margins, target=target)) == pytest.approx(beta / 7, rel=1e-12)
    assert float(auto_beta(torch.tensor([1.0, -1.0]))) == pytest.approx(math.log(4), rel=1e-6)


def test_auto_beta_has_a_ceiling() -> None:
    assert float(auto_beta(torch.zeros(4), maximum=2000.0)) == 2000
    assert float(auto_beta(torch.full((4,), 1e-9))) == 5000
    for margins in ([], [1.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="not finite"):
            auto_beta(torch.tensor(margins))
    for wrong in ({"target": 0.5}, {"target": 0.0}, {"maximum": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            auto_beta(torch.ones(2), **wrong)


def test_safeguards_refuse() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        safeguard_scale(torch.ones(2, 3), torch.ones(1, 3), mu=0.5)
    for mu in (-0.1, 1.1):
        with pytest.raises(ValueError, match="mu is"):
            safeguard_scale(torch.ones(2, 3), torch.ones(2, 3), mu=mu)


# All of them


def losses() -> dict[str, tuple[Callable[..., Tensor], str]]:
    """Functions of the policy's errors (p) and of what is held (r), by what each argument is."""
    labels, groups = LABELS[:4], torch.tensor([0, 1, 0, 1])
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    found: dict[str, tuple[Callable[..., Tensor], str]] = {
        "sft": (sft_loss, "pr"),
        "spin": (lambda *e: spin_loss(*e, beta=5000.0), "pprr"),
        "mapo": (lambda *e: mapo_loss(*e, beta=0.1), "pp"),
        "orpo": (lambda *e: orpo_loss(*e, beta=1.0, weight=0.1), "pp"),
        "orpo sharp": (lambda *e: orpo_loss(*e, beta=5000.0, weight=0.1), "pp"),
        "dgpo": (lambda e, er, a: dgpo_loss(e, er, a * advantage, groups, beta=5000.0), "prr"),
        "dgpo clipped": (
            lambda e, er, old: dgpo_loss(
                e, er, advantage.to(e), groups, beta=5000.0, error_old=old, clip_range=0.05
            ),
            "prr",
        ),
    }
    for utility in UTILITIES:
        found[f"kto {utility}"] = (
            lambda e, er, z, utility=utility: diffusion_kto_loss(
                e, er, labels, beta=5000.0, baseline=z.mean(), utility=utility
            ),
            "prr",
        )
    for weighting in WEIGHTINGS:
        found[f"awm {weighting}"] = (
            lambda e, old, a, weighting=weighting: awm_loss(
                e, old, a * advantage, 0.7, clip_range=0.2, weighting=weighting
            ),
            "prr",
        )

    def nft(v: Tensor, old: Tensor, r: Tensor) -> Tensor:
        wide = [x.reshape(4, 1, 1, 1).expand(4, 2, 2, 2) for x in (v, old)]
        x0 = torch.zeros(4, 2, 2, 2).to(v)
        return nft_loss(*wide, x0, x0 + 0.1, 0.6, r.sigmoid(), beta=0.1)

    return found | {"nft": (nft, "prr")}


@pytest.mark.parametrize("name", losses())
def test_no_gradient_reaches_what_is_held(name: str) -> None:
    function, kinds = losses()[name]
    leaves = trained(*errors(len(kinds), size=4))
    function(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [kind == "p" for kind in kinds]


@pytest.mark.parametrize("name", losses())
def test_finite_for_huge_and_for_tiny_errors_in_float32(name: str) -> None:
    function, kinds = losses()[name]
    tiny = [1e-8, 3e-8, 0.0, 2e-8, 1e-8, 0.0]
    scenes = [[20.0] + [1.0] * 5, [1.0, 20.0] * 3, [2e4] + [1.0] * 5, [1.0, 2e4] * 3, tiny, [0.0] * 6]
    for scene in scenes:
        leaves = trained(*(torch.full((4,), value) for value in scene[: len(kinds)]))
        loss = function(*leaves)
        loss.sum().backward()
        assert torch.isfinite(loss).all(), scene
        for leaf, kind in zip(leaves, kinds, strict=True):
            assert kind == "r" or torch.isfinite(leaf.grad).all(), scene
