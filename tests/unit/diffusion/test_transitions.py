"""Recorded transitions replayed at any places of the grid: the same bits as while drawing, and nothing without a density."""

from __future__ import annotations

import pytest
import torch

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, Path, replay_transitions, sample, sample_trajectory, step_moments
from diffexpo.diffusion.kernels import flow_sde_transition
from diffexpo.diffusion.transitions import sampler_transitions, stochastic_grid, transition_rows
from diffexpo.errors import ConfigError
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator

VP = Path.vp(torch.linspace(0.9995, 0.98, 200).cumprod(0))
CASES = {
    "ddpm": (VP, SamplerConfig(name="ddpm", steps=5, guidance=3.0)),
    "ddim": (VP, SamplerConfig(name="ddim", steps=5, guidance=3.0, eta=0.7)),
    "ddim clipped": (
        Path.vp(torch.linspace(0.9995, 0.98, 200).cumprod(0), clip_sample_range=1.0),
        SamplerConfig(name="ddim", steps=5, guidance=1.0, eta=1.0),
    ),
    "window": (VP, SamplerConfig(name="ddim", steps=5, guidance=3.0, eta=1.0, random_steps=(1, 3))),
    **{
        kind: (
            Path.flow(3.0),
            SamplerConfig(name="flow_sde", steps=5, guidance=3.0, sde=kind, noise_level=0.4),
        )
        for kind in ("flow_grpo", "dance", "cps")
    },
}
TEXTS = ["a", "b", "c", "d"]


def noise() -> NoiseSource:
    return NoiseSource([torch_generator("replay", text) for text in TEXTS], (2, 1, 1))


def drawn(path: Path, sampler: SamplerConfig):
    policy = ToyPolicy(path)
    conditioning, negative = policy.encode_prompts(TEXTS), policy.encode_prompts([""] * len(TEXTS))
    trajectory = sample_trajectory(policy, conditioning, negative, sampler, noise())
    return policy, conditioning, negative, trajectory


@pytest.mark.parametrize(("path", "sampler"), CASES.values(), ids=CASES.keys())
def test_replay_is_exact_at_every_step_with_a_density(path, sampler):
    policy, conditioning, negative, trajectory = drawn(path, sampler)
    assert torch.equal(trajectory.latents[-1], sample(policy, conditioning, negative, sampler, noise()))
    places = trajectory.has_density.nonzero().flatten().tolist()
    certain = {"ddpm": 1, "flow_sde": int(sampler.sde == "cps")}.get(sampler.name, 0)
    window = sampler.random_steps
    if sampler.name != "ddim" or window is not None:
        assert places == (list(range(*window)) if window else list(range(5 - certain)))
    assert places
    for place in places:
        index = torch.full((len(TEXTS),), place)
        ends = trajectory.latents[place], trajectory.latents[place + 1]
        replayed = replay_transitions(policy, sampler, index, *ends, conditioning, negative)
        assert torch.equal(replayed.log_prob, trajectory.mean_log_probs[place])
        assert torch.equal(replayed.mean, trajectory.means[place])
        fixed = replay_transitions(
            policy, sampler, index, *ends, conditioning, negative, is_negative_fixed=True
        )
        assert torch.equal(fixed.log_prob, replayed.log_prob)


def test_rows_of_different_steps_are_those_of_each_step():
    path, sampler = CASES["flow_grpo"]
    grid = stochastic_grid(path, sampler)
    x, prediction = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64, generator=torch_generator("rows"))
    index = torch.tensor([3, 0, 1, 3])
    mean, std = step_moments(path, transition_rows(grid, index), prediction, x)
    for row, place in enumerate(index.tolist()):
        one = step_moments(path, grid[place], prediction[row : row + 1], x[row : row + 1])
        assert torch.equal(mean[row], one[0][0]) and torch.equal(std[row], one[1][0])


def test_the_negative_branch_gets_a_gradient_unless_it_is_fixed():
    path, sampler = CASES["ddim"]
    policy, conditioning, negative, trajectory = drawn(path, sampler)
    found = []
    for is_fixed in (False, True):
        text = negative.tensors["text"].clone().requires_grad_()
        replayed = replay_transitions(
            policy, sampler, torch.full((4,), 1), trajectory.latents[1], trajectory.latents[2],
            conditioning, type(negative)({"text": text}), is_negative_fixed=is_fixed,
        )  # fmt: skip
        replayed.log_prob.sum().backward()
        found.append(0.0 if text.grad is None else float(text.grad.abs().sum()))
    assert found[0] > 0 and found[1] == 0


def test_the_sde_has_the_std_of_its_kernel_and_the_rule_at_sigma_1():
    path, sampler = CASES["flow_grpo"]
    grid = sampler_transitions(path, sampler)
    assert grid[0].sigma_t == 1.0 and grid[0].sigma_max == grid[1].sigma_t
    for step in grid:
        x, u = torch.randn(2, 1, 3, dtype=torch.float64, generator=torch_generator("sde"))
        mean, std = step_moments(path, step, u, x)
        expected = flow_sde_transition(
            x, u, sigma=step.sigma_t, sigma_next=step.sigma_s, noise_level=0.4, sigma_max=grid[1].sigma_t
        )
        assert torch.equal(mean, expected[0]) and step.std == float(std) == float(expected[1]) > 0


def test_outside_the_window_a_flow_follows_the_ode():
    sampler = SamplerConfig(name="flow_sde", steps=5, guidance=1.0, random_steps=(1, 2))
    grid = sampler_transitions(Path.flow(3.0), sampler)
    ode = sampler_transitions(Path.flow(3.0), SamplerConfig(name="flow_euler", steps=5))
    assert [step.has_density for step in grid] == [False, True, False, False, False]
    assert [*grid[:1], *grid[2:]] == [*ode[:1], *ode[2:]]


def test_what_has_no_density_is_refused():
    policy, conditioning, negative, trajectory = drawn(*CASES["ddpm"])
    with pytest.raises(ValueError, match="4 of 4 steps have no density"):
        replay_transitions(
            policy, CASES["ddpm"][1], torch.full((4,), 4), *trajectory.latents[4:6], conditioning, negative
        )
    for changes in ({"name": "flow_euler"}, {"name": "flow_sde", "noise_level": 0.0}):
        with pytest.raises(ConfigError, match="no density"):
            stochastic_grid(Path.flow(), SamplerConfig(steps=4, guidance=1.0, **changes))
    with pytest.raises(ConfigError, match="random_steps"):
        sampler_transitions(VP, SamplerConfig(name="ddim", steps=4, eta=1.0, random_steps=(2, 9)))
