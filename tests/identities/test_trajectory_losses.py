"""What must hold exactly of the methods that train on trajectories, as functions of numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.algorithms.d3po import d3po_loss, transition_margin
from diffexpo.algorithms.ddpo import clipped_surrogate, ddpo_sf_loss, ppo_clip_loss, probability_ratio
from diffexpo.algorithms.dpok import dpok_kl, dpok_policy_loss, dpok_value_loss
from diffexpo.algorithms.flow_grpo import flow_grpo_kl, guard_loss, guard_ratio, mix_grpo_window
from diffexpo.algorithms.prdp import prdp_loss, predicted_reward_difference
from diffexpo.algorithms.spo import spo_loss, spo_min_margin
from diffexpo.diffusion import (
    ddim_transition,
    flow_sde_transition,
    gaussian_kl,
    mean_log_prob,
    x0_from_eps,
)
from diffexpo.online import best_and_worst, group_advantages

LN2 = 0.6931471805599453
SIZE = 6


def normal(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (SIZE,)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype))


def log_probs(
    count: int, seed: int = 0, spread: float = 0.3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [-1 + spread * values.to(dtype) for values in normal(count, seed=seed)]


def trained(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf)[0]


class GaussianStep:
    """A policy of one transition of the flow SDE, its velocity a linear network."""

    def __init__(self, seed: int) -> None:
        self.x, self.weight = normal(2, SIZE, SIZE, seed=seed)
        self.weight = (0.3 * self.weight).requires_grad_()
        noise = normal(1, SIZE, SIZE, seed=seed + 1)[0]
        self.sigmas = {"sigma": 0.8, "sigma_next": 0.6}
        with torch.no_grad():
            mean, std = self.moments()
            self.next = mean + std[:, None] * noise
            self.old_mean, self.old_log_prob, self.std, self.noise = mean, self.log_prob(), std, noise

    def moments(self) -> tuple[Tensor, Tensor]:
        return flow_sde_transition(self.x, self.x @ self.weight, **self.sigmas, noise_level=0.7)

    def log_prob(self) -> Tensor:
        return mean_log_prob(self.next, *self.moments())

    def moved(self) -> GaussianStep:
        with torch.no_grad():
            self.weight += 0.05 * normal(1, SIZE, SIZE, seed=99)[0]
        return self


def test_score_function_gradient_is_importance_sampling_gradient_on_the_first_pass() -> None:
    step = GaussianStep(0)
    advantage = normal(1, seed=5)[0]
    score = gradient(ddpo_sf_loss(step.log_prob(), advantage), step.weight)
    for loss in (ppo_clip_loss, dpok_policy_loss):
        clipped = loss(step.log_prob(), step.old_log_prob, advantage, clip_range=1e-4)
        assert torch.equal(clipped, -advantage)
        assert torch.equal(gradient(clipped, step.weight), score)
    assert (score.abs() > 0).all()
    # After a move they part: the identity above is one of the first pass only.
    step.moved()
    plain = ppo_clip_loss(step.log_prob(), step.old_log_prob, advantage, clip_range=10.0)
    assert not torch.allclose(
        gradient(plain, step.weight), gradient(ddpo_sf_loss(step.log_prob(), advantage), step.weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_is_exactly_1_on_replay(dtype: torch.dtype) -> None:
    log_prob, advantage = log_probs(2, dtype=dtype)
    mean = normal(1, SIZE, 4, dtype=dtype)[0]
    assert (probability_ratio(log_prob, log_prob.clone()) == 1).all()
    assert (guard_ratio(log_prob, log_prob.clone(), mean, mean.clone(), 0.3) == 1).all()
    assert torch.equal(ppo_clip_loss(log_prob, log_prob, advantage, clip_range=1e-4), -advantage)
    step = GaussianStep(3)
    assert (probability_ratio(step.log_prob(), step.old_log_prob) == 1).all()
    assert (
        guard_ratio(step.log_prob(), step.old_log_prob, step.moments()[0], step.old_mean, step.std) == 1
    ).all()


def test_the_clip_is_inactive_inside_its_range() -> None:
    old, advantage = log_probs(1)[0], normal(1, seed=2)[0]
    inside = old + torch.linspace(-0.09, 0.09, SIZE, dtype=torch.float64)
    expected = -advantage * torch.exp(inside - old)
    for loss in (ppo_clip_loss, dpok_policy_loss):
        leaf = inside.clone().requires_grad_()
        value = loss(leaf, old, advantage, clip_range=0.1)
        torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
        torch.testing.assert_close(gradient(value, leaf), expected, rtol=1e-15, atol=0)
    ref = log_probs(1, seed=4)[0]
    here = transition_margin(inside, ref, old, ref, beta=3.0, clip_range=0.1)
    torch.testing.assert_close(here, 3.0 * (inside - old), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("gap", "advantage", "ppo_acts"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)],
)
def test_outside_the_range_ppo_stops_one_direction_and_dpok_both(
    gap: float, advantage: float, ppo_acts: bool
) -> None:
    old = torch.full((1,), -1.0, dtype=torch.float64)
    a = torch.full((1,), advantage, dtype=torch.float64)
    leaf = (old + gap).requires_grad_()
    slope = gradient(ppo_clip_loss(leaf, old, a, clip_range=0.1), leaf)
    assert float(slope) == pytest.approx(-advantage * math.exp(gap) if ppo_acts else 0.0, rel=1e-12)
    assert float(gradient(dpok_policy_loss(leaf, old, a, clip_range=0.1), leaf)) == 0.0
    # PPO is the pessimistic one of the two.
    assert ppo_clip_loss(leaf, old, a, clip_range=0.1) >= dpok_policy_loss(leaf, old, a, clip_range=0.1)


@pytest.mark.parametrize("global_std", [True, False])
def test_grpo_is_ppo_with_group_advantages(global_std: bool) -> None:
    rewards = np.array([0.1, 0.9, 0.4, 3.0, 2.0, 2.5])
    groups = ["a", "a", "a", "b", "b", "b"]
    log_prob, old = log_probs(2)
    ours = ppo_clip_loss(
        log_prob,
        old,
        torch.from_numpy(group_advantages(rewards, groups, global_std=global_std)),
        clip_range=0.2,
    ).mean()
    # GRPO's objective, to be maximised: mean over prompts and their images of min(rho A, clip(rho) A).
    objective = 0.0
    for members in ([0, 1, 2], [3, 4, 5]):
        own = rewards[members]
        spread = rewards.std() if global_std else own.std()
        for i in members:
            rho = math.exp(float(log_prob[i] - old[i]))
            a = (rewards[i] - own.mean()) / (spread + 1e-4)
            objective += min(rho * a, min(max(rho, 0.8), 1.2) * a) / 3 / 2
    assert float(ours) == pytest.approx(-objective, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [d3po_loss, spo_loss])
def test_ln_2_and_zero_margin_where_policy_is_reference(loss, dtype: torch.dtype) -> None:
    winner, loser = trained(*log_probs(2, dtype=dtype))
    four = (winner, loser, winner.detach().clone(), loser.detach().clone())
    for beta in (0.1, 10.0):
        assert (transition_margin(*four, beta=beta, clip_range=0.1) == 0).all()
        value = loss(*four, beta=beta, clip_range=0.1)
        assert value.dtype == dtype and (value == torch.log(torch.tensor(2.0, dtype=dtype))).all()
        slope = torch.autograd.grad(value.sum(), (winner, loser))
        assert torch.equal(slope[0], torch.full_like(winner, -beta / 2)), "descent must favour the winner"
        assert torch.equal(slope[1], -slope[0])


def test_d3po_and_spo_are_one_loss_on_different_pairs() -> None:
    four = log_probs(4)
    assert torch.equal(d3po_loss(*four, beta=2.0, clip_range=0.1), spo_loss(*four, beta=2.0, clip_range=0.1))
    w, l_, wr, lr = four
    margin = transition_margin(*four, beta=2.0, clip_range=0.1)
    assert torch.equal(margin, -transition_margin(l_, w, lr, wr, beta=2.0, clip_range=0.1))
    assert (margin.abs() <= 2.0 * math.log(1.1 / 0.9) + 1e-15).all()
    # The tie of the papers' code (weights 0, 0) is a constant: ln 2 whatever the log-probs.
    assert float(-torch.nn.functional.logsigmoid(0.0 * margin).mean()) == pytest.approx(LN2, abs=1e-16)


def test_d3po_stops_where_a_ratio_left_the_range() -> None:
    ref = torch.full((4,), -1.0, dtype=torch.float64)
    winner, loser = trained(
        ref + torch.tensor([0.5, -0.5, 0.0, 0.0]), ref + torch.tensor([0.0, 0.0, 0.5, -0.5])
    )
    value = d3po_loss(winner, loser, ref, ref, beta=2.0, clip_range=0.1)
    of_winner, of_loser = torch.autograd.grad(value.sum(), (winner, loser))
    assert (of_winner[:2] == 0).all() and (of_winner[2:] < 0).all()
    assert (of_loser[2:] == 0).all() and (of_loser[:2] > 0).all()


def test_spo_threshold_is_a_gap_of_scores() -> None:
    assert spo_min_margin(0.0) == 0.0
    assert spo_min_margin(0.3) == pytest.approx(0.6190392084062235, rel=1e-15)
    for threshold in (0.3, 0.4):
        scores = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.3, -0.2]])
        best, worst, valid = best_and_worst(scores, spo_min_margin(threshold))
        extremes = torch.stack([scores.max(1).values, scores.min(1).values], dim=1).softmax(1)
        assert torch.equal(valid, extremes[:, 0] - extremes[:, 1] > threshold)
        assert 0 < int(valid.sum()) < len(scores)
        assert (scores.gather(1, best[:, None]) >= scores.gather(1, worst[:, None])).all()


def test_dpok_baseline_is_the_mean_reward() -> None:
    rewards = torch.tensor([0.2, 1.0, 0.3], dtype=torch.float64)
    value = torch.full((3,), float(rewards.mean()), dtype=torch.float64, requires_grad=True)
    slope = gradient(dpok_value_loss(value, rewards), value)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-15) and (slope != 0).all()
    assert (dpok_value_loss(rewards, rewards) == 0).all()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_dpoks_two_kls_differ_by_a_factor_of_the_step(eta: float) -> None:
    scales = {"alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6}
    x, eps, ref = normal(3, SIZE, 2, 2)

    def moments(noise: Tensor) -> tuple[Tensor, Tensor]:
        return ddim_transition(x0_from_eps(noise, x, 0.6, 0.8), noise, **scales, eta=eta)

    (mean, std), (mean_ref, _) = moments(eps), moments(ref)
    exact = dpok_kl(mean, mean_ref, kind="gaussian", std=std)
    slope = math.sqrt(0.36 - float(std[0]) ** 2) - 0.8 * 0.8 / 0.6
    torch.testing.assert_close(exact, dpok_kl(eps, ref) * slope**2 / (2 * std**2), rtol=1e-12, atol=0)
    assert torch.equal(exact, gaussian_kl(mean, mean_ref, std))
    assert (dpok_kl(eps, eps.clone()) == 0).all() and (exact > 0).all()


def test_flow_grpo_kl_is_the_exact_one_times_the_step() -> None:
    x, u, u_ref = normal(3, SIZE, 4)
    sigmas = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0.0]
    factors = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        step = {"sigma": sigma, "sigma_next": sigma_next}
        moments = [
            flow_sde_transition(x, v, **step, noise_level=0.7, sigma_max=sigmas[1]) for v in (u, u_ref)
        ]
        (mean, std), (mean_ref, _) = moments
        ours = flow_grpo_kl(mean, mean_ref, std, **step)
        # As the published code has it: the SDE's noise scale without the root of the step.
        inner = sigmas[1] if sigma == 1 else sigma
        g = 0.7 * math.sqrt(sigma / (1 - inner))
        theirs = (mean - mean_ref).square().flatten(1).mean(1) / (2 * g**2)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        # And in closed form in the velocities.
        push = (1 + g**2 * (1 - sigma) / (2 * sigma)) * (sigma - sigma_next)
        closed = push**2 * (u - u_ref).square().flatten(1).mean(1) / (2 * g**2)
        torch.testing.assert_close(ours, closed, rtol=1e-9, atol=0)
        factors.append(float((gaussian_kl(mean, mean_ref, std) / ours).mean()))
    assert min(factors) == pytest.approx(3.72, abs=0.01) and max(factors) == pytest.approx(112.4, abs=0.1)


def test_guard_ratio_is_the_mean_product_of_shift_and_noise() -> None:
    step = GaussianStep(7)
    step.moved()
    mean = step.moments()[0]
    ratio = guard_ratio(step.log_prob(), step.old_log_prob, mean, step.old_mean, step.std)
    expected = torch.exp(((mean - step.old_mean) * step.noise).mean(1))
    torch.testing.assert_close(ratio, expected, rtol=1e-12, atol=0)
    assert ((ratio - 1).abs() > 1e-4).all()


def test_guard_ratio_is_centred_and_the_plain_one_is_not() -> None:
    old_mean, shift, noise = normal(3, SIZE, 4)
    for std in (0.1, 1.0, 3.0):
        mean = old_mean + 0.2 * shift
        logs: dict[str, list[Tensor]] = {"guard": [], "plain": []}
        for sign in (1, -1):  # antithetic noise: odd terms cancel exactly, what remains is the bias
            x = old_mean + sign * std * noise
            new, old = mean_log_prob(x, mean, std), mean_log_prob(x, old_mean, std)
            logs["guard"].append(guard_ratio(new, old, mean, old_mean, std).log())
            logs["plain"].append(probability_ratio(new, old).log())
        torch.testing.assert_close(
            sum(logs["guard"]), torch.zeros(SIZE, dtype=torch.float64), rtol=0, atol=1e-13
        )
        torch.testing.assert_close(
            sum(logs["plain"]), -2 * gaussian_kl(mean, old_mean, std), rtol=1e-9, atol=1e-12
        )
        # Of the same scale whatever the std, which the plain ratio is not.
        torch.testing.assert_close(logs["guard"][0], (0.2 * shift * noise).mean(1), rtol=1e-9, atol=1e-12)


def test_guard_loss_gives_every_step_size_the_same_pull() -> None:
    advantage = normal(1, seed=8)[0]
    x, u, noise = normal(3, SIZE, SIZE, seed=9)
    pulls = []
    for sigma_next in (0.79, 0.6, 0.3):  # noise so small that the mean is the Euler step's
        step = {"sigma": 0.8, "sigma_next": sigma_next}
        velocity = u.clone().requires_grad_()
        mean, std = flow_sde_transition(x, velocity, **step, noise_level=1e-3)
        x_next = mean.detach() + std[:, None] * noise
        log_prob = mean_log_prob(x_next, mean, std)
        ratio = guard_ratio(log_prob, log_prob.detach(), mean, mean.detach(), std)
        pulls.append(gradient(guard_loss(ratio, advantage, **step, clip_range=2e-6), velocity))
        torch.testing.assert_close(pulls[-1], advantage[:, None] * noise / SIZE, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pulls[0], pulls[2], rtol=1e-4, atol=1e-6)
    replay = guard_loss(torch.ones(SIZE), advantage, sigma=0.8, sigma_next=0.3, clip_range=2e-6)
    torch.testing.assert_close(replay, -(advantage / 0.5).float())


def test_prdp_is_0_at_the_optimum_of_the_regularised_reward() -> None:
    beta = 0.7
    reference = torch.softmax(normal(1, 5)[0], 0)
    rewards = normal(1, 5, seed=1)[0]
    optimum = reference * torch.exp(rewards / beta)
    optimum = optimum / optimum.sum()  # p_ref exp(r / beta) / Z, the maximiser of E r - beta KL
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))
    a, b = pairs[:, 0], pairs[:, 1]

    def loss(policy: Tensor, shift: float = 0.0) -> Tensor:
        new, ref = policy.log()[None], reference.log()[None]
        both = (new[:, a], new[:, b])
        references, own = (ref[:, a], ref[:, b]), (rewards[a] + shift, rewards[b] + shift)
        return prdp_loss(*both, *references, *both, *own, beta=beta, clip_range=0.1)

    torch.testing.assert_close(loss(optimum), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-25)
    torch.testing.assert_close(loss(optimum, 7.0), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-25)
    torch.testing.assert_close(loss(reference), (rewards[a] - rewards[b]) ** 2, rtol=1e-14, atol=0)
    assert (loss(torch.roll(optimum, 1)) > 1e-3).any()


def test_prdp_does_not_care_which_trajectory_is_first() -> None:
    eight = [*normal(6, 3, SIZE), *normal(2, seed=3)]
    a, b, ar, br, ao, bo, ra, rb = eight
    settings = {"beta": 2.0, "clip_range": 0.3}
    assert torch.equal(prdp_loss(*eight, **settings), prdp_loss(b, a, br, ar, bo, ao, rb, ra, **settings))
    plain = (predicted_reward_difference(a, b, ar, br, beta=2.0) - (ra - rb)) ** 2
    assert (prdp_loss(*eight, **settings) >= plain).all(), "the proximal loss is the pessimistic one"
    assert torch.equal(prdp_loss(*eight[:4], a, b, ra, rb, **settings), plain), "on replay nothing is clipped"


@pytest.mark.parametrize(("target", "acts"), [(10.0, False), (-10.0, True)])
def test_prdp_stops_a_step_that_has_gone_far_enough_only_in_the_right_direction(
    target: float, acts: bool
) -> None:
    # Both steps of the first trajectory began at the reference; one has moved up by 0.5, beyond 0.1.
    zero = torch.zeros(2, 1, dtype=torch.float64)
    first = torch.tensor([[0.5], [0.0]], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([target], dtype=torch.float64)
    loss = prdp_loss(first, zero, zero, zero, zero, zero, reward, 0 * reward, beta=2.0, clip_range=0.1)
    slope = gradient(loss, first).flatten()
    d = 2.0 * (0.5 if acts else 0.1)
    step = 2 * (d - target) * 2.0
    assert slope.tolist() == pytest.approx([step if acts else 0.0, step], rel=1e-12)


def test_constants_get_no_gradient() -> None:
    def check(function, values: list[Tensor], with_gradient: list[bool], **settings: float) -> None:
        leaves = trained(*values)
        function(*leaves, **settings).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == with_gradient, function.__name__

    four, eight = log_probs(4), [*normal(6, 3, SIZE), *normal(2)]
    means = normal(2, SIZE, 4)
    check(ddpo_sf_loss, four[:2], [True, False])
    check(ppo_clip_loss, four[:3], [True, False, False], clip_range=0.2)
    check(dpok_policy_loss, four[:3], [True, False, False], clip_range=0.2)
    check(dpok_value_loss, four[:2], [True, False])
    check(dpok_kl, means, [True, False])
    check(d3po_loss, four, [True, True, False, False], beta=1.0, clip_range=0.2)
    check(spo_loss, four, [True, True, False, False], beta=1.0, clip_range=0.2)
    check(prdp_loss, eight, [True, True] + [False] * 6, beta=1.0, clip_range=0.2)
    check(guard_loss, four[:2], [True, False], sigma=0.8, sigma_next=0.6, clip_range=0.2)
    std = torch.full((SIZE,), 0.4)
    check(lambda *v: guard_ratio(*v, std), [*four[:2], *means], [True, False, True, False])
    check(lambda *v: flow_grpo_kl(*v, std, sigma=0.8, sigma_next=0.6), means, [True, False])


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [5.0, -5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_for_log_prob_gaps_of_1e4(gap: float, advantage: float, dtype: torch.dtype) -> None:
    old = torch.full((2,), -1.0, dtype=dtype)
    a = torch.full((2,), advantage, dtype=dtype)
    zero = torch.zeros(2, 3, dtype=dtype)

    def assert_finite(function) -> None:
        leaf = (old + gap).requires_grad_()
        loss = function(leaf)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(leaf.grad).all()

    assert_finite(lambda x: ppo_clip_loss(x, old, a, clip_range=1e-4))
    assert_finite(lambda x: dpok_policy_loss(x, old, a, clip_range=1e-4))
    assert_finite(lambda x: ddpo_sf_loss(x, a))
    ratio = probability_ratio(old + gap, old)
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, math.exp(math.copysign(20, gap))), rtol=1e-5, atol=0
    )
    assert_finite(
        lambda x: guard_loss(
            guard_ratio(x, old, zero, zero, 0.3), a, sigma=0.8, sigma_next=0.6, clip_range=1e-6
        )
    )
    for loss in (d3po_loss, spo_loss):
        assert_finite(lambda x, loss=loss: loss(x, old, old, old, beta=10.0, clip_range=0.1))
        assert_finite(lambda x, loss=loss: loss(old, x, old, old, beta=10.0, clip_range=0.1))
    assert_finite(
        lambda x: prdp_loss(
            x[None], old[None], old[None], old[None], old[None], old[None], a, -a, beta=1.0, clip_range=0.1
        )
    )


def test_the_limit_of_the_ratio_is_where_it_says() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    leaf = torch.tensor([-20.5, -19.5, 19.5, 20.5], dtype=torch.float64, requires_grad=True)
    ratio = probability_ratio(leaf, old)
    torch.testing.assert_close(
        ratio.detach(),
        torch.exp(torch.tensor([-20, -19.5, 19.5, 20], dtype=torch.float64)),
        rtol=1e-15,
        atol=0,
    )
    assert (gradient(ratio, leaf) > 0).tolist() == [False, True, True, False]


def test_float64_advantages_do_not_lift_float32_losses() -> None:
    log_prob, old = log_probs(2, dtype=torch.float32)
    advantage = normal(1)[0]
    for loss in (
        ppo_clip_loss(log_prob, old, advantage, clip_range=0.1),
        dpok_policy_loss(log_prob, old, advantage, clip_range=0.1),
        ddpo_sf_loss(log_prob, advantage),
        dpok_value_loss(log_prob, advantage),
        clipped_surrogate(old.exp(), advantage, clip_range=0.1),
    ):
        assert loss.dtype == torch.float32


def test_mix_grpo_window_walks_from_noise_to_image() -> None:
    settings = {"num_transitions": 10, "window_size": 4, "shift_every": 3, "stride": 1}
    windows = [mix_grpo_window(step, **settings, wrap=False) for step in range(40)]
    assert windows[0] == (0, 1, 2, 3) == windows[2]
    assert windows[3] == (1, 2, 3, 4)
    assert windows[18] == (6, 7, 8, 9) == windows[39], "without wrap the last window stays"
    wrapped = [mix_grpo_window(step, **settings) for step in range(42)]
    assert wrapped[:21] == windows[:21] and wrapped[21:] == wrapped[:21]


@pytest.mark.parametrize("stride", [1, 3, 4, 9])
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("window_size", [1, 4, 10])
def test_mix_grpo_window_is_always_whole_and_reaches_the_end(
    window_size: int, wrap: bool, stride: int
) -> None:
    windows = [
        mix_grpo_window(
            step, num_transitions=10, window_size=window_size, shift_every=2, stride=stride, wrap=wrap
        )
        for step in range(60)
    ]
    assert all(window == tuple(range(window[0], window[0] + window_size)) for window in windows)
    covered = set().union(*windows)
    assert {0, 9} <= covered <= set(range(10))
    if stride <= window_size:
        assert covered == set(range(10))


def test_settings_out_of_range_are_refused() -> None:
    four = log_probs(4)
    x = torch.zeros(3, 1)
    for clip_range in (0.0, -0.1, float("nan")):
        for loss in (ppo_clip_loss, dpok_policy_loss):
            with pytest.raises(ValueError, match=f"clip_range is {clip_range}; expected a number above 0"):
                loss(*four[:3], clip_range=clip_range)
        with pytest.raises(ValueError, match="prdp_loss: clip_range"):
            prdp_loss(x, x, x, x, x, x, x[0], x[0], beta=1.0, clip_range=clip_range)
    for clip_range in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"clip_range is {clip_range}; expected 0 < c < 1"):
            d3po_loss(*four, beta=1.0, clip_range=clip_range)
    for loss in (d3po_loss, spo_loss):
        with pytest.raises(ValueError, match="beta is 0.0; expected a number above 0"):
            loss(*four, beta=0.0, clip_range=0.1)
    with pytest.raises(ValueError, match="beta is -1"):
        predicted_reward_difference(x, x, x, x, beta=-1)
    with pytest.raises(ValueError, match="pass the transition's std"):
        dpok_kl(x, x, kind="gaussian")
    with pytest.raises(ValueError, match="leave std out"):
        dpok_kl(x, x, std=0.3)
    with pytest.raises(ValueError, match="kind is 'exact'; expected eps_mse or gaussian"):
        dpok_kl(x, x, kind="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold is 1.0"):
        spo_min_margin(1.0)
    for wrong, message in (
        ({"step": -1}, "step is -1"),
        ({"window_size": 0}, "window_size is 0"),
        ({"window_size": 11}, "window_size is 11, but there are 10 transitions"),
        ({"shift_every": 0}, "shift_every is 0"),
        ({"stride": 0}, "stride is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mix_grpo_window(**{"step": 0, "num_transitions": 10, "window_size": 4, **wrong})
