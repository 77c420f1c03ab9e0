"""Grids and steps equal those of diffusers' schedulers, because that is how an aligned model is deployed."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import Path, add_noise, ddim_transition, sample, sampler_grid, step_moments
from diffexpo.diffusion.path import dynamic_shift
from tests.unit.diffusion.toys import ABAR, SHAPE, Gaussian, condition, noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS = BETAS | {"clip_sample": False}
# NumPy 2 warns about how diffusers hands torch tensors to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]


def precise(scheduler: DDIMScheduler | DDPMScheduler) -> DDIMScheduler | DDPMScheduler:
    """The scheduler with its table in float64."""
    scheduler.alphas_cumprod = ABAR
    if isinstance(scheduler, DDIMScheduler):
        one = torch.tensor(1.0, dtype=torch.float64)
        scheduler.final_alpha_cumprod = one if scheduler.config.set_alpha_to_one else ABAR[0]
    else:
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def path_of(scheduler: object, prediction: str = "epsilon") -> Path:
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    return Path.from_scheduler_config(config | {"prediction_type": prediction})


def latents(seed: int) -> Tensor:
    return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(grid: list, path: Path) -> list[int]:
    return [round(step.t * (path.num_train_timesteps - 1)) for step in grid]


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler), ("dpmpp", DPMSolverMultistepScheduler)],
)
def test_timesteps(name: str, kind: type, steps: int, spacing: str, offset: int) -> None:
    settings = SETTINGS if kind is not DPMSolverMultistepScheduler else BETAS
    scheduler = kind(timestep_spacing=spacing, steps_offset=offset, **settings)
    scheduler.set_timesteps(steps)
    path = path_of(scheduler)
    grid = sampler_grid(path, name, steps)
    assert indices(grid, path) == scheduler.timesteps.tolist()
    # What the network is fed survives the way through float32 t.
    assert path.timestep(torch.tensor([step.t for step in grid])).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim_steps(prediction: str, eta: float, to_one: bool, spacing: str, offset: int) -> None:
    scheduler = precise(
        DDIMScheduler(
            **SETTINGS,
            set_alpha_to_one=to_one,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
        )
    )
    scheduler.set_timesteps(6)
    path = path_of(scheduler, prediction)
    x, output, fresh = latents(0), latents(1), latents(2)
    for step, timestep in zip(sampler_grid(path, "ddim", 6, eta), scheduler.timesteps, strict=True):
        mean, std = step_moments(path, step, output, x)
        ours = mean + std.reshape(-1, 1, 1, 1) * fresh
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert step.std == pytest.approx(float(std[0]), abs=1e-15)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_steps(prediction: str, spacing: str, offset: int, clip: bool) -> None:
    scheduler = precise(
        DDPMScheduler(
            **SETTINGS | {"clip_sample": clip},
            variance_type="fixed_small",
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
        )
    )
    scheduler.set_timesteps(6)
    path = path_of(scheduler, prediction)
    x, output = latents(0), latents(1)
    for step, timestep in zip(sampler_grid(path, "ddpm", 6), scheduler.timesteps, strict=True):
        theirs = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(5)).prev_sample
        fresh = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
        mean, std = step_moments(path, step, output, x)
        ours = mean + std.reshape(-1, 1, 1, 1) * fresh
        # Where the last step leaves from t = 1, diffusers adds noise of std 1e-10 (its guard against log 0).
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 if step.has_density else 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_clipping_keeps_the_networks_eps(eta: float) -> None:
    scheduler = precise(DDIMScheduler(**SETTINGS | {"clip_sample": True}, clip_sample_range=0.8))
    scheduler.set_timesteps(6)
    path = path_of(scheduler)
    x, output, fresh = latents(0), latents(1), latents(2)
    for step, timestep in zip(sampler_grid(path, "ddim", 6, eta), scheduler.timesteps, strict=True):
        mean, std = step_moments(path, step, output, x)
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(mean + std.reshape(-1, 1, 1, 1) * fresh, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0)])
def test_ddim_and_ddpm_samples(name: str, eta: float, prediction: str) -> None:
    # ddpm is DDIM at eta 1 with another last alpha, so one scheduler that takes its noise from us serves both.
    scheduler = DDIMScheduler(
        **SETTINGS, prediction_type=prediction, steps_offset=1, set_alpha_to_one=name == "ddpm"
    )
    scheduler.set_timesteps(20)
    policy = Gaussian(path_of(scheduler, prediction))
    conditioning, negative = condition(-0.5, 1.0), condition(0.0, 0.2)
    sampler = SamplerConfig(name=name, steps=20, guidance=3.0, eta=eta)
    ours = sample(policy, conditioning, negative, sampler, noise("a", "b"))
    source = noise("a", "b")
    x, level = source.draw(), 1.0 if name == "ddpm" else eta
    steps = zip(sampler_grid(policy.path, name, 20, eta), scheduler.timesteps, strict=True)
    for step, timestep in steps:
        t = torch.full((2,), float(timestep) / 999)
        away, towards = (policy.predict(x, t, side) for side in (negative, conditioning))
        fresh = source.draw() if step.has_density else torch.zeros_like(x)
        guided = away + 3.0 * (towards - away)
        x = scheduler.step(guided, timestep, x, eta=level, variance_noise=fresh).prev_sample
    # Both in float32: 20 steps with about ten roundings of 6e-8 each, of values up to 4.
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_dpmpp_samples(prediction: str, spacing: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=prediction, timestep_spacing=spacing, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    policy = Gaussian(path_of(scheduler, prediction))
    conditioning = condition(0.7, -0.4)
    x = noise("a", "b").draw()
    for timestep in scheduler.timesteps:
        t = (timestep / 999).repeat(2).float()
        x = scheduler.step(policy.predict(x, t, conditioning), timestep, x).prev_sample
    sampler = SamplerConfig(name="dpmpp", steps=steps, guidance=1.0)
    ours = sample(policy, conditioning, None, sampler, noise("a", "b"))
    # Up to 20 steps as above, each of which also extrapolates from the one before.
    torch.testing.assert_close(ours, x, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_flow_euler_samples(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    path = path_of(scheduler)
    grid = sampler_grid(path, "flow_euler", steps)
    sigmas = torch.tensor([*(step.sigma_t for step in grid), grid[-1].sigma_s], dtype=torch.float64)
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=1e-6, atol=1e-6)
    fed = path.timestep(torch.tensor([step.t for step in grid]))
    torch.testing.assert_close(fed, scheduler.timesteps, rtol=1e-6, atol=1e-3)
    policy, conditioning = Gaussian(path), condition(0.7, -0.4)
    x = noise("a", "b").draw()
    for timestep in scheduler.timesteps:
        x = scheduler.step(
            policy.predict(x, (timestep / 1000).repeat(2), conditioning), timestep, x
        ).prev_sample
    ours = sample(
        policy,
        conditioning,
        None,
        SamplerConfig(name="flow_euler", steps=steps, guidance=1.0),
        noise("a", "b"),
    )
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_flow_grpos_ten_step_schedule() -> None:
    grid = sampler_grid(Path.flow(3.0), "flow_euler", 10)
    printed = [1000, 960.1, 913.3, 857.7, 790.4, 707.3, 602.2, 464.9, 278.0, 8.9]
    assert [round(1000 * step.t, 1) for step in grid] == printed


def test_add_noise_and_v_are_those_of_the_training_scheduler() -> None:
    scheduler = precise(DDPMScheduler(**SETTINGS))
    path, index = path_of(scheduler, "v_prediction"), torch.tensor([3, 900])
    x0, eps, t = latents(0), latents(1), index.double() / 999
    ours = add_noise(x0, eps, *path.alpha_sigma(t))
    torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, index), rtol=1e-12, atol=1e-12)
    velocity = scheduler.get_velocity(x0, eps, index)
    torch.testing.assert_close(path.target(x0, eps, t), velocity, rtol=1e-12, atol=1e-12)


def test_one_kernel_is_ddpms_posterior_and_the_flows_euler_step() -> None:
    x0, eps = latents(0), latents(1)
    abar_t, abar_s = ABAR[700], ABAR[650]
    x_t = abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * eps
    mean, std = ddim_transition(
        x0,
        eps,
        alpha_t=abar_t.sqrt(),
        sigma_t=(1 - abar_t).sqrt(),
        alpha_s=abar_s.sqrt(),
        sigma_s=(1 - abar_s).sqrt(),
        eta=1.0,
    )
    ratio = abar_t / abar_s
    posterior = (
        abar_s.sqrt() * (1 - ratio) * x0 + ratio.sqrt() * (1 - abar_s) * x_t
    ) / (1 - abar_t)  # fmt: skip
    torch.testing.assert_close(mean, posterior, rtol=1e-12, atol=1e-12)
    variance = (1 - abar_s) / (1 - abar_t) * (1 - ratio)
    torch.testing.assert_close(std, variance.sqrt().expand(2), rtol=1e-12, atol=0)
    mean, std = ddim_transition(x0, eps, alpha_t=0.3, sigma_t=0.7, alpha_s=0.4, sigma_s=0.6, eta=0.0)
    euler = (0.3 * x0 + 0.7 * eps) + (0.6 - 0.7) * (eps - x0)
    torch.testing.assert_close(mean, euler, rtol=1e-12, atol=1e-12)
    assert std.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDPM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete"]
    + ["EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LCM", "TCD"],
)
def test_settings_left_out_take_the_classs_defaults(name: str) -> None:
    name += "Scheduler"
    scheduler = getattr(diffusers, name)()
    bare = Path.from_scheduler_config({"_class_name": name})
    full = Path.from_scheduler_config(dict(scheduler.config) | {"_class_name": name})
    fields = ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample_range")
    for field in fields:
        assert getattr(bare, field) == getattr(full, field), field
    assert torch.equal(bare.alphas_cumprod, full.alphas_cumprod)
    torch.testing.assert_close(bare.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_tables(schedule: str, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    path = path_of(scheduler, "v_prediction")
    theirs = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(path.alphas_cumprod, theirs, rtol=2e-5, atol=2e-6)
    assert (float(path.alphas_cumprod[-1]) == 0) == zero_snr


def test_stable_diffusion_15() -> None:
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    path = path_of(scheduler)
    assert (path.steps_offset, path.set_alpha_to_one, path.clip_sample_range) == (1, False, None)
    assert float(path.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-8)
    assert float(path.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)
    # DDPO's printed number: 50 steps, offset 1, the last step goes from index 1 to abar[0].
    assert sampler_grid(path, "ddim", 50, 1.0)[-1].std == pytest.approx(0.0206, abs=5e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
def test_dynamic_shifting(tokens: int, kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type=kind)
    mu = calculate_shift(tokens)
    for steps, given, lowest in ((1, None, None), (7, None, None), (28, None, None), (4, "list", "steps")):
        even = np.linspace(1.0, 1 / steps, steps) if given else None
        scheduler.set_timesteps(None if given else steps, sigmas=even, mu=mu)
        config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
        path = Path.from_scheduler_config(config, image_tokens=tokens, lowest_level=lowest)
        grid = sampler_grid(path, "flow_euler", steps)
        ours = torch.tensor([step.t for step in grid] + [grid[-1].t_next])
        torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-5, atol=1e-7)


def test_the_shift_of_two_sizes_as_published() -> None:
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5), rel=1e-12)
    assert dynamic_shift(4096) == pytest.approx(math.exp(1.15), rel=1e-12)
    assert dynamic_shift(256, kind="linear") == pytest.approx(0.5, rel=1e-12)
