"""Samplers: what they cost, what they draw, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import (
    Path,
    num_network_evaluations,
    predict_guided,
    prediction_errors,
    sample,
    sample_trajectory,
    sampler_grid,
)
from diffexpo.errors import ConfigError, Interrupted
from tests.unit.diffusion.toys import ABAR, SHAPE, Gaussian, condition, noise

VP, FLOW = Path.vp(ABAR), Path.flow()


def settings(name: str, steps: int = 4, guidance: float = 1.0, eta: float = 0.0) -> SamplerConfig:
    return SamplerConfig(name=name, steps=steps, guidance=guidance, eta=eta)


@pytest.mark.parametrize(
    ("name", "path", "eta", "tolerance"),
    [
        ("ddpm", VP, 0.0, 0.02),
        ("ddim", VP, 0.0, 0.02),
        ("ddim", VP, 1.0, 0.02),
        ("dpmpp", VP, 0.0, 0.02),
        ("flow_euler", FLOW, 0.0, 0.05),
    ],
)
def test_every_sampler_draws_the_data(name: str, path: Path, eta: float, tolerance: float) -> None:
    # The denoiser is exact for N(mean, 0.5^2), so many steps must draw that.
    keys = [str(row) for row in range(100)]
    conditioning = condition(*[0.7] * 50, *[-0.4] * 50)
    x = sample(Gaussian(path), conditioning, None, settings(name, 100, eta=eta), noise(*keys))
    for half, mean in ((x[:50], 0.7), (x[50:], -0.4)):
        # 2400 elements: standard error 0.010 of the mean and 0.007 of the std.
        assert float(half.mean()) == pytest.approx(mean, abs=0.03 + tolerance)
        assert float(half.std()) == pytest.approx(0.5, abs=0.03 + tolerance)


def test_guidance_costs_twice_and_only_when_it_acts() -> None:
    negative = condition(0.0, 0.0)
    for guidance, with_negative, rows in ((3.0, negative, 4), (1.0, negative, 2), (3.0, None, 2)):
        policy = Gaussian(VP)
        sample(policy, condition(1.0, 2.0), with_negative, settings("ddim", 3, guidance), noise("a", "b"))
        assert policy.rows == [rows] * 3
    assert num_network_evaluations(settings("ddpm", 50), True) == 100
    assert num_network_evaluations(settings("ddpm", 50), False) == 50


def test_guidance_goes_away_from_the_negative() -> None:
    policy, x = Gaussian(VP), noise("a").draw()
    conditional = policy.predict(x, torch.tensor([0.5]), condition(1.0))
    unconditional = policy.predict(x, torch.tensor([0.5]), condition(0.0))
    guided = predict_guided(policy, x, 0.5, condition(1.0), condition(0.0), 4.0)
    torch.testing.assert_close(guided, unconditional + 4 * (conditional - unconditional))
    assert torch.equal(predict_guided(policy, x, 0.5, condition(1.0), None, 4.0), conditional)
    assert torch.equal(predict_guided(policy, x, 0.5, condition(1.0), condition(0.0), 1.0), conditional)


def test_deterministic_steps_draw_no_noise() -> None:
    for name, path, draws in (("ddim", VP, 1), ("ddpm", VP, 4), ("dpmpp", VP, 1), ("flow_euler", FLOW, 1)):
        source, again = noise("a"), noise("a")
        sample(Gaussian(path), condition(0.5), None, settings(name), source)
        for _ in range(draws):
            again.draw()
        assert torch.equal(source.draw(), again.draw()), name


def test_ticks_and_stops() -> None:
    ticks = []
    for name in ("ddpm", "dpmpp"):
        ticks.clear()
        sample(Gaussian(VP), condition(0.5), None, settings(name), noise("a"), tick=lambda: ticks.append(1))
        assert len(ticks) == 4

    def stop() -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        sample(Gaussian(VP), condition(0.5), None, settings("ddpm"), noise("a"), tick=stop)


def test_no_density_at_eta_0() -> None:
    for name in ("ddim", "dpmpp"):
        with pytest.raises(
            ConfigError, match=rf"{name} with eta 0.0.*no density.*take ddpm, or ddim with eta above 0"
        ):
            sample_trajectory(Gaussian(VP), condition(0.5), None, settings(name), noise("a"))
    with pytest.raises(ConfigError, match="flow_euler.*no density.*take flow_sde"):
        sample_trajectory(Gaussian(FLOW), condition(0.5), None, settings("flow_euler"), noise("a"))
    with pytest.raises(ConfigError, match="two or more steps"):
        sample_trajectory(Gaussian(VP), condition(0.5), None, settings("ddpm", 1), noise("a"))


def test_samplers_fit_their_model() -> None:
    with pytest.raises(
        ConfigError, match="sampler.name is 'flow_euler', but the model is a vp model; expected ddpm"
    ):
        sample(Gaussian(VP), condition(0.5), None, settings("flow_euler"), noise("a"))
    for name in ("ddpm", "ddim", "dpmpp"):
        with pytest.raises(
            ConfigError, match=f"'{name}', but the model is a flow model; expected flow_euler"
        ):
            sample(Gaussian(FLOW), condition(0.5), None, settings(name), noise("a"))


@pytest.mark.parametrize(
    ("name", "steps", "eta", "message"),
    [
        ("ddpm", 1001, 0.0, "steps is 1001.*at most 1000"),
        ("dpmpp", 1000, 0.0, "steps is 1000.*at most 999"),
        ("ddim", 0, 0.0, "steps is 0; expected 1 or more"),
        ("ddim", 4, 1.5, "eta is 1.5; expected a number from 0"),
        ("euler", 4, 0.0, "name is 'euler'; expected ddpm, ddim, dpmpp, flow_euler or flow_sde"),
    ],
)
def test_grids_refuse(name: str, steps: int, eta: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler_grid(VP, name, steps, eta)


def test_an_offset_beyond_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps_offset 1 the first level is 1000 of 1000"):
        sampler_grid(Path.vp(ABAR, steps_offset=1), "ddpm", 1000)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_go_down_to_the_image(name: str, spacing: str) -> None:
    path = Path.vp(ABAR, timestep_spacing=spacing)
    for steps in (1, 3, 50, 999):
        grid = sampler_grid(path, name, steps, 1.0)
        assert len(grid) == steps
        assert all(one.t > other.t for one, other in pairwise(grid))
        assert all(step.sigma_s < step.sigma_t for step in grid)
        assert grid[-1].sigma_s == 0 and not grid[-1].has_density


def test_row_counts_must_agree() -> None:
    with pytest.raises(ValueError, match="2 conditionings, 1 negatives and 2 noise generators"):
        sample(Gaussian(VP), condition(0.1, 0.2), condition(0.0), settings("ddim"), noise("a", "b"))
    with pytest.raises(ValueError, match="1 conditionings, no negatives and 2 noise"):
        sample(Gaussian(VP), condition(0.1), None, settings("ddim"), noise("a", "b"))
    x = torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match="2 latents, 2 noises, 1 times and 2 conditionings"):
        prediction_errors(Gaussian(VP), x, x, torch.tensor([0.5]), condition(0.1, 0.2))


def test_zero_terminal_snr_samples_stay_finite() -> None:
    root = ABAR.sqrt()
    table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    path = Path.vp(table, "v_prediction", timestep_spacing="trailing")
    for name in ("ddpm", "ddim", "dpmpp"):
        x = sample(Gaussian(path), condition(0.5), None, settings(name, 8, eta=1.0), noise("a"))
        assert torch.isfinite(x).all(), name
