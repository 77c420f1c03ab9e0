"""What must hold exactly of paths, conversions, guidance, noise, samplers and their log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import (
    NoiseDraw,
    Path,
    add_noise,
    classifier_free_guidance,
    ddim_transition,
    double_guidance,
    empty_prompt_mask,
    eps_from_v,
    eps_from_velocity,
    eps_from_x0,
    flow_sde_transition,
    gaussian_kl,
    mean_log_prob,
    pair_errors,
    prediction_error,
    prediction_errors,
    sample,
    sample_trajectory,
    v_target,
    velocity_target,
    x0_from_eps,
    x0_from_v,
    x0_from_velocity,
)
from diffexpo.policies.toy import TOY_LORA, ToyPolicy
from diffexpo.rng import torch_generator
from tests.unit.diffusion.toys import (
    ABAR,
    SHAPE,
    Elementwise,
    Gaussian,
    condition,
    noise,
    replayed_log_probs,
)

ZERO_AND_ONE = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
VP, FLOW = Path.vp(ABAR, steps_offset=1, set_alpha_to_one=False), Path.flow(3.0)
SAMPLERS = {
    "ddpm": (VP, SamplerConfig(name="ddpm", steps=5, guidance=3.0)),
    "ddim": (VP, SamplerConfig(name="ddim", steps=5, guidance=3.0, eta=0.0)),
    "ddim eta": (VP, SamplerConfig(name="ddim", steps=5, guidance=1.0, eta=0.6)),
    "dpmpp": (VP, SamplerConfig(name="dpmpp", steps=5, guidance=3.0)),
    "flow_euler": (FLOW, SamplerConfig(name="flow_euler", steps=5, guidance=3.0)),
}


def normal(*seeds: int, size: tuple[int, ...] = (5, *SHAPE)) -> list[Tensor]:
    return [
        torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_errors_of_one_prediction_in_every_space() -> None:
    x0, eps, wrong = normal(0, 1, 2)
    abar = torch.tensor([0.98, 0.7, 0.5, 0.2, 0.02], dtype=torch.float64)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    x_t, target = add_noise(x0, eps, alpha, sigma), v_target(x0, eps, alpha, sigma)
    prediction = target + 0.1 * wrong
    mse_v = prediction_error(prediction, target)
    mse_eps = prediction_error(eps_from_v(prediction, x_t, alpha, sigma), eps)
    mse_x0 = prediction_error(x0_from_v(prediction, x_t, alpha, sigma), x0)
    same(mse_eps, abar * mse_v)
    same(mse_x0, (1 - abar) * mse_v)
    same(mse_x0, mse_eps * (1 - abar) / abar)

    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, target = add_noise(x0, eps, 1 - t, t), velocity_target(x0, eps)
    prediction = target + 0.1 * wrong
    mse_u = prediction_error(prediction, target)
    same(prediction_error(eps_from_velocity(prediction, x_t, t), eps), (1 - t) ** 2 * mse_u)
    same(prediction_error(x0_from_velocity(prediction, x_t, t), x0), t**2 * mse_u)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_exact_prediction_gives_back_x0_and_eps(prediction: str) -> None:
    path = Path.flow() if prediction == "flow" else Path.vp(ABAR, prediction)
    x0, eps = normal(0, 1)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    x_t = add_noise(x0, eps, alpha, sigma)
    back_x0, back_eps = path.x0_eps(path.target(x0, eps, t), x_t, t)
    if prediction == "flow":
        same(alpha + sigma, torch.ones_like(t))
    else:
        same(alpha**2 + sigma**2, torch.ones_like(t))
    same(back_x0, x0)
    same(back_eps, eps)


def test_conversions_invert_each_other() -> None:
    x0, eps = normal(0, 1)
    x_t = add_noise(x0, eps, 0.6, 0.8)
    same(x0_from_eps(eps, x_t, 0.6, 0.8), x0)
    same(eps_from_x0(x0, x_t, 0.6, 0.8), eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance(dtype: torch.dtype) -> None:
    unconditional, conditional, full = (x.to(dtype) for x in normal(0, 1, 2))
    near = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * 8}
    assert torch.equal(classifier_free_guidance(unconditional, conditional, scale=0.0), unconditional)
    torch.testing.assert_close(
        classifier_free_guidance(unconditional, conditional, scale=1.0), conditional, **near
    )
    for scale in (0.0, 1.0, 7.5):
        assert torch.equal(classifier_free_guidance(full, full, scale=scale), full)

    def double(image_scale: float, text_scale: float) -> Tensor:
        return double_guidance(
            unconditional, conditional, full, image_scale=image_scale, text_scale=text_scale
        )

    torch.testing.assert_close(double(1.0, 1.0), full, **near)
    torch.testing.assert_close(double(1.0, 0.0), conditional, **near)
    assert torch.equal(double(0.0, 0.0), unconditional)


def test_densities_in_closed_form() -> None:
    x, mean = normal(0, 1)
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    wide = std.reshape(-1, 1, 1, 1)
    density = torch.exp(-((x - mean) ** 2) / (2 * wide**2)) / (wide * math.sqrt(2 * math.pi))
    same(mean_log_prob(x, mean, std)[1:], density.log().flatten(1).mean(1)[1:])
    one = torch.ones(2, 3)
    assert mean_log_prob(one, one, 1.0).tolist() == pytest.approx([-0.9189385] * 2, abs=1e-6)
    assert gaussian_kl(x, x, std).tolist() == [0.0] * 5
    same(gaussian_kl(mean + wide, mean, std), torch.full((5,), 0.5, dtype=torch.float64))
    # The KL is the expected log-ratio under the first Gaussian.
    (draws,) = normal(3, size=(1, 200_000))
    ratio = mean_log_prob(0.3 + 0.5 * draws, torch.full_like(draws, 0.3), 0.5)
    ratio = ratio - mean_log_prob(0.3 + 0.5 * draws, torch.zeros_like(draws), 0.5)
    kl = gaussian_kl(torch.full((1, 1), 0.3), torch.zeros(1, 1), 0.5)
    assert float(ratio) == pytest.approx(float(kl), abs=5e-3)


def test_a_step_without_noise_has_no_density() -> None:
    x = torch.zeros(2, 4)
    for std in (0.0, torch.zeros(2)):
        assert not torch.isfinite(mean_log_prob(x, x, std)).any()


@pytest.mark.parametrize("kind", ["flow_grpo", "dance", "cps"])
def test_flow_sde_without_noise_is_the_ode(kind: str) -> None:
    x, u = normal(0, 1)
    mean, std = flow_sde_transition(x, u, sigma=0.8, sigma_next=0.5, noise_level=0.0, kind=kind)
    same(mean, x - 0.3 * u)
    assert std.tolist() == [0.0] * 5


def test_flow_grpo_at_sigma_1_takes_the_next_sigma() -> None:
    x, u = normal(0, 1)
    step = {"sigma_next": 0.96, "noise_level": 0.7}
    with pytest.raises(ValueError, match=r"sigma is 1.*sigma_max=sigmas\[1\]"):
        flow_sde_transition(x, u, sigma=1.0, **step)
    mean, std = flow_sde_transition(x, u, sigma=1.0, **step, sigma_max=0.96)
    g2 = 0.49 * 1.0 / (1 - 0.96)
    same(std, torch.full((5,), math.sqrt(g2 * 0.04), dtype=torch.float64))
    same(mean, x * (1 - g2 / 2 * 0.04) - 0.04 * u)
    # Below 1 the rule does not act; in a mixed batch it acts on the rows that need it.
    lower = flow_sde_transition(x, u, sigma=0.98, **step)
    for one, other in zip(lower, flow_sde_transition(x, u, sigma=0.98, **step, sigma_max=0.5), strict=True):
        assert torch.equal(one, other)
    sigmas = torch.tensor([1.0, 0.98, 1.0, 0.98, 0.98], dtype=torch.float64)
    mixed = flow_sde_transition(x, u, sigma=sigmas, **step, sigma_max=0.96)
    same(mixed[0], torch.where((sigmas == 1).reshape(-1, 1, 1, 1), mean, lower[0]))
    same(mixed[1], torch.where(sigmas == 1, std, lower[1]))
    for kind in ("dance", "cps"):
        assert torch.isfinite(flow_sde_transition(x, u, sigma=1.0, **step, kind=kind)[0]).all()


def test_cps_keeps_the_noise_level_and_ends_without_noise() -> None:
    x0, eps = normal(0, 1)
    x, u = add_noise(x0, eps, 0.3, 0.7), eps - x0
    mean, std = flow_sde_transition(x, u, sigma=0.7, sigma_next=0.4, noise_level=0.6, kind="cps")
    direction = (mean - 0.6 * x0) / eps
    same(direction**2 + std.reshape(-1, 1, 1, 1) ** 2, torch.full_like(x0, 0.16))
    mean, std = flow_sde_transition(x, u, sigma=0.7, sigma_next=0.0, noise_level=0.6, kind="cps")
    same(mean, x0)
    assert std.tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="kind is 'euler'; expected 'flow_grpo', 'dance' or 'cps'"):
        flow_sde_transition(x, u, sigma=0.7, sigma_next=0.4, noise_level=0.6, kind="euler")


def test_ddim_keeps_the_marginal() -> None:
    # x0 and eps true: the step's mean and noise together are again alpha_s x0 + sigma_s N(0, 1).
    for eta in (0.0, 0.3, 1.0):
        scales = {"alpha_t": 0.5, "sigma_t": 0.9, "alpha_s": 0.7, "sigma_s": 0.6, "eta": eta}
        mean, std = ddim_transition(*ZERO_AND_ONE, **scales)
        assert float(mean[0, 0] ** 2 + std[0] ** 2) == pytest.approx(0.36, abs=1e-14)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_their_batch(name: str) -> None:
    path, sampler = SAMPLERS[name]
    policy = Elementwise(path)
    keys, means = ("a", "b", "c", "d", "e"), (0.0, 1.0, -1.0, 0.5, 2.0)

    def draw(rows: list[int]) -> Tensor:
        chosen = condition(*(means[row] for row in rows))
        negative = condition(*([0.25] * len(rows)))
        return sample(policy, chosen, negative, sampler, noise(*(keys[row] for row in rows)))

    whole = draw([0, 1, 2, 3, 4])
    assert torch.equal(whole, torch.cat([draw([0, 1]), draw([2, 3, 4])]))
    assert torch.equal(whole, torch.cat([draw([row]) for row in range(5)]))
    assert torch.equal(whole[[3, 0, 4]], draw([3, 0, 4]))
    repeated = draw([2, 2])
    assert torch.equal(repeated[0], repeated[1]) and torch.equal(repeated[0], whole[2])
    assert not torch.equal(whole[0], whole[1])


def test_noise_draws_do_not_depend_on_their_batch() -> None:
    keys = ["p1", "p2", "p3", "p4"]
    for path in (VP, FLOW):
        whole = NoiseDraw.keyed(keys, (0, 1, "noise", 7), path, SHAPE)
        for rows in ([0, 1], [3, 2, 0], [1, 1]):
            part = NoiseDraw.keyed([keys[row] for row in rows], (0, 1, "noise", 7), path, SHAPE)
            assert torch.equal(part.eps, whole.eps[rows]) and torch.equal(part.t, whole.t[rows])
        other = NoiseDraw.keyed(keys, (0, 1, "noise", 8), path, SHAPE)
        assert not torch.equal(other.eps, whole.eps) and not torch.equal(other.t, whole.t)
        assert len({row.sum().item() for row in whole.eps}) == 4


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_the_whole_range_of_times_leaves_draws_as_they_are(path: Path) -> None:
    keys = [f"p{row}" for row in range(64)]
    eps, times = [], []
    for key in keys:
        generator = torch_generator(0, "noise", key)
        eps.append(torch.randn(SHAPE, generator=generator))
        times.append(path.training_t(1, generator))
    for draw in (
        NoiseDraw.keyed(keys, (0, "noise"), path, SHAPE),
        NoiseDraw.keyed(keys, (0, "noise"), path, SHAPE, (0.0, 1.0)),
    ):
        assert torch.equal(draw.eps, torch.stack(eps)) and torch.equal(draw.t, torch.cat(times))


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (0.5, 1.0), (0.3, 0.7)])
def test_times_are_mapped_affinely_into_their_range(path: Path, low: float, high: float) -> None:
    keys = [f"p{row}" for row in range(500)]
    whole = NoiseDraw.keyed(keys, (0, "noise"), path, SHAPE)
    part = NoiseDraw.keyed(keys, (0, "noise"), path, SHAPE, (low, high))
    assert torch.equal(part.eps, whole.eps)
    # Three roundings in float32, of numbers below 1: at most 3e-8 each.
    torch.testing.assert_close(part.t.double(), low + (high - low) * whole.t.double(), rtol=0, atol=1e-7)
    assert part.t.dtype == torch.float32 and part.t.min() >= low - 1e-7 and part.t.max() <= high
    index = torch.round(part.t * 999)
    assert path is FLOW or (index.min() >= round(low * 999) and index.max() <= round(high * 999))


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_several_draws_lie_in_slices_of_equal_probability(path: Path) -> None:
    keys, times = [f"p{row}" for row in range(500)], (0.2, 0.8)
    whole = NoiseDraw.keyed(keys, (0, "noise"), path, SHAPE, times, 4)
    assert whole.eps.shape == (2000, *SHAPE) and len({row.sum().item() for row in whole.eps}) == 2000
    t = whole.t.reshape(4, 500)
    # Where a quarter of all times ends: the levels are uniform, and the logit of a flow's time is normal before the shift.
    normal = torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    inner = (
        torch.tensor([0.25, 0.5, 0.75])
        if path is VP
        else FLOW.shift / (FLOW.shift - 1 + 1 / normal.sigmoid())
    )
    borders = [0.2, *(0.2 + 0.6 * inner).tolist(), 0.8]
    for row, low, high in zip(t, borders, borders[1:], strict=False):
        assert low - 1e-6 <= float(row.min()) < float(row.max()) <= high + 1e-6
    # As a whole they are spread as single draws are.
    single = NoiseDraw.keyed([f"q{row}" for row in range(2000)], (0, "noise"), path, SHAPE, times).t
    assert float((t.flatten().sort().values - single.sort().values).abs().max()) < 0.05
    part = NoiseDraw.keyed(keys[7:9], (0, "noise"), path, SHAPE, times, 4)
    rows = [7, 8, 507, 508, 1007, 1008, 1507, 1508]
    assert torch.equal(part.eps, whole.eps[rows]) and torch.equal(part.t, whole.t[rows])


@pytest.mark.parametrize("times", [(0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_a_range_without_times_is_refused(times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"timestep_range is .* expected 0 <= low < high <= 1"):
        NoiseDraw.keyed(["a"], (0,), VP, SHAPE, times)


def test_the_global_generator_is_never_used() -> None:
    before = torch.get_rng_state()
    NoiseDraw.keyed(["a"], (0,), VP, SHAPE)
    empty_prompt_mask(["a"], (0,), 0.5)
    path, sampler = SAMPLERS["ddpm"]
    sample(Gaussian(path), condition(0.5), None, sampler, noise("a"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["ddpm", "ddim eta"])
@pytest.mark.parametrize("network", ["toy", "lora"])
def test_a_replay_differs_by_exactly_0(name: str, network: str) -> None:
    path, sampler = SAMPLERS[name]
    if network == "toy":
        policy: ToyPolicy | Gaussian = Gaussian(path)
        conditioning, negative, source = condition(0.5, -0.5, 1.0), condition(0.0, 0.0, 0.0), noise(*"abc")
    else:
        policy = ToyPolicy(path, tuning=TOY_LORA)
        conditioning, negative = policy.encode_prompts(["x", "y", "z"]), policy.encode_prompts([""] * 3)
        source = noise(*"abc")
        source.shape = policy.latent_shape
    trajectory = sample_trajectory(policy, conditioning, negative, sampler, source)
    assert trajectory.has_density.any() and torch.isfinite(trajectory.mean_log_probs).all()
    replayed = replayed_log_probs(policy, trajectory, conditioning, negative, sampler)
    assert (replayed.detach() - trajectory.mean_log_probs).abs().max().item() == 0.0
    if network == "lora":
        assert replayed.requires_grad and not trajectory.mean_log_probs.requires_grad


def test_a_trajectory_ends_where_sampling_ends() -> None:
    for name in ("ddpm", "ddim eta"):
        path, sampler = SAMPLERS[name]
        policy, conditioning, negative = Gaussian(path), condition(0.5, -0.5), condition(0.0, 0.0)
        trajectory = sample_trajectory(policy, conditioning, negative, sampler, noise("a", "b"))
        assert torch.equal(
            trajectory.latents[-1], sample(policy, conditioning, negative, sampler, noise("a", "b"))
        )
        assert torch.equal(trajectory.latents[0], noise("a", "b").draw())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_prediction_errors_of_a_known_network(prediction: str) -> None:
    path = Path.flow() if prediction == "flow" else Path.vp(ABAR, prediction)
    policy = Gaussian(path)
    x0, eps = normal(0, 1)
    t = torch.tensor([0.2, 0.4, 0.5, 0.8, 1.0])
    conditioning = condition(0.5, 0.0, 0.0, -0.5, 1.0)
    value = prediction_errors(policy, x0, eps, t, conditioning)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in path.alpha_sigma(t.double()))
    mean = conditioning.tensors["mean"].double().reshape(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * eps
    gap = (x_t - alpha * mean) / (0.25 * alpha**2 + sigma**2)
    wrong_eps, wrong_x0 = sigma * gap - eps, mean + 0.25 * alpha * gap - x0
    wrong = {
        "epsilon": wrong_eps,
        "v_prediction": alpha * wrong_eps - sigma * wrong_x0,
        "sample": wrong_x0,
        "flow": wrong_eps - wrong_x0,
    }[prediction]
    assert value.dtype == torch.float64
    same(value, wrong.square().flatten(1).mean(1))
    # Both halves of a pair see the same noise, time and prompt, in one forward.
    policy.rows.clear()
    winner, loser = pair_errors(policy, x0, x0 + 0.1, eps, t, conditioning)
    assert policy.rows == [10]
    same(winner, value)
    same(loser, prediction_errors(policy, x0 + 0.1, eps, t, conditioning))
    winner, loser = pair_errors(policy, x0, x0, eps, t, conditioning)
    assert torch.equal(winner, loser)


def test_half_precision_latents_get_float32_errors() -> None:
    x0, eps = (x.float() for x in normal(0, 1))
    x0 = x0.half().float()
    t, conditioning = torch.full((5,), 0.5), condition(*[0.0] * 5)
    value = prediction_errors(Gaussian(VP), x0.half(), eps, t, conditioning)
    assert value.dtype == torch.float32
    assert torch.equal(value, prediction_errors(Gaussian(VP), x0, eps, t, conditioning))
