"""The denoising steps of each sampler as numbers, and the one function that takes a step.

Grids equal those of diffusers' schedulers, because that is how an aligned model is deployed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion.kernels import FlowSdeKind, ddim_transition, eps_from_x0, flow_sde_transition
from diffexpo.diffusion.path import Path, shifted
from diffexpo.errors import ConfigError

FLOW_SAMPLERS = ("flow_euler", "flow_sde")


@dataclass(frozen=True)
class Transition:
    """One denoising step from level t to level t_next, in numbers: x = alpha x0 + sigma eps at each end.

    `eps_from_clipped_x0` says which eps goes with an x0 that was clipped: the one x_t then implies (ddpm), or
    the network's (ddim). `sde` names the stochastic step of a flow model (None: the kernel in alpha and
    sigma), with its `noise_level` and what stands in for sigma 1. Of several transitions at once
    (`transition_rows`) the numbers are tensors (B,).
    """

    t: float
    t_next: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    eta: float = 0.0
    std: float = 0.0
    eps_from_clipped_x0: bool = False
    sde: FlowSdeKind | None = None
    noise_level: float = 0.0
    sigma_max: float | None = None

    @property
    def has_density(self) -> bool:
        """Whether the step is random (std above 0)."""
        return self.std > 0

    def ddim(self, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and std (B,) of the step by `ddim_transition`."""
        return ddim_transition(
            x0,
            eps,
            alpha_t=self.alpha_t,
            sigma_t=self.sigma_t,
            alpha_s=self.alpha_s,
            sigma_s=self.sigma_s,
            eta=self.eta,
        )


def sampler_grid(path: Path, name: str, steps: int, eta: float = 0.0) -> list[Transition]:
    """The transitions of a sampler, from pure noise to the image.

    Args:
        path: The model's path; its spacing, offset and last alpha are used.
        name: ddpm, ddim, dpmpp (all vp), flow_euler or flow_sde (flow; the latter's noise is that of
            `sampler_transitions`).
        steps: Number of transitions, >= 1.
        eta: Noise of ddim in [0, 1]; ddpm has 1, the others 0.
    Returns:
        `steps` transitions with t decreasing; 50 ddpm steps on 1000 leading levels start at index 980 +
        offset.
    Raises:
        ConfigError: the sampler is unknown or does not fit the path, steps or eta is out of range, or there
            are more steps than levels.
    Source: diffusers' DDPM, DDIM, DPMSolverMultistep and FlowMatchEuler schedulers. DDIM's target level is
        index - N // steps for every spacing, DDPM's the next of the list, and the flow schedule is shifted
        twice at its lower end, as there (with a fixed shift; `Path.lowest_level` names the other two).
    """
    if name not in ("ddpm", "ddim", "dpmpp", *FLOW_SAMPLERS):
        raise ConfigError(
            f"sampler.name is {name!r}; expected ddpm, ddim, dpmpp, {' or '.join(FLOW_SAMPLERS)}"
        )
    if steps < 1:
        raise ConfigError(f"sampler.steps is {steps}; expected 1 or more")
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampler.eta is {eta}; expected a number from 0 (deterministic) to 1")
    if (name in FLOW_SAMPLERS) != (path.kind == "flow"):
        fitting = " or ".join(FLOW_SAMPLERS) if path.kind == "flow" else "ddpm, ddim or dpmpp"
        raise ConfigError(
            f"sampler.name is {name!r}, but the model is a {path.kind} model; expected {fitting}"
        )
    if name in FLOW_SAMPLERS:
        return _flow_grid(path, steps)
    count = path.num_train_timesteps
    limit = count - 1 if name == "dpmpp" else count
    if steps > limit:
        raise ConfigError(
            f"sampler.steps is {steps}, but {name} on this model's {count} levels takes at most {limit}"
        )
    index = _vp_indices(path, name, steps)
    if max(index) >= count:
        raise ConfigError(
            f"sampler.steps is {steps}: with steps_offset {path.steps_offset} the first level is "
            f"{max(index)} of {count}; take fewer steps"
        )
    if name == "ddim":
        following = [i - count // steps for i in index]
    else:
        following = [*index[1:], -1]
    last_abar = 1.0 if name != "ddim" or path.set_alpha_to_one else float(path.table[0])
    noise = {"ddpm": 1.0, "ddim": float(eta), "dpmpp": 0.0}[name]
    grid = [_vp_transition(path, i, j, last_abar, noise) for i, j in zip(index, following, strict=True)]
    return [_with_std(path, replace(step, eps_from_clipped_x0=name == "ddpm")) for step in grid]


def sampler_transitions(path: Path, sampler: SamplerConfig) -> list[Transition]:
    """The transitions of a sampler as it is set, the noise of a flow's SDE and `random_steps` included.

    Args:
        path: The model's path.
        sampler: All its settings.
    Returns:
        `sampler.steps` transitions; those outside `random_steps` are deterministic (eta 0, the ODE).
    Raises:
        ConfigError: as for `sampler_grid`, or `random_steps` holds none of the steps.
    """
    grid = sampler_grid(path, sampler.name, sampler.steps, sampler.eta)
    if sampler.name == "flow_sde":
        level, highest = sampler.noise_level, grid[1].sigma_t if len(grid) > 1 else 0.5
        random = (replace(step, sde=sampler.sde, noise_level=level, sigma_max=highest) for step in grid)
        grid = [_with_std(path, step) for step in random]
    if sampler.random_steps is None:
        return grid
    first, last = sampler.random_steps
    if not 0 <= first < last <= len(grid):
        raise ConfigError(
            f"sampler.random_steps is [{first}, {last}]; expected two numbers from 0 to steps ({len(grid)}), "
            "the first below the second"
        )
    return [
        step
        if first <= place < last
        else replace(step, eta=0.0, std=0.0, sde=None, noise_level=0.0, sigma_max=None)
        for place, step in enumerate(grid)
    ]


def stochastic_grid(path: Path, sampler: SamplerConfig) -> list[Transition]:
    """`sampler_transitions`, refusing a sampler none of whose steps is random."""
    grid = sampler_transitions(path, sampler)
    if not any(transition.has_density for transition in grid):
        instead = (
            "take flow_sde with noise_level above 0"
            if path.kind == "flow"
            else "take ddpm, or ddim with eta above 0, with two or more steps"
        )
        raise ConfigError(
            f"sampler {sampler.name} with eta {sampler.eta} is deterministic: its kernel has no density, so "
            f"there are no log-probabilities; {instead}"
        )
    return grid


def transition_rows(grid: list[Transition], index: Tensor) -> Transition:
    """Transitions of a grid as one, whose numbers are float64 tensors (B,): row b is grid[index[b]].

    Raises:
        ValueError: the rows are steps of different kinds (for example a random step of a flow and one of its
            ODE).
    """
    chosen = [grid[place] for place in index.tolist()]
    kinds = {(step.sde, step.noise_level, step.sigma_max, step.eps_from_clipped_x0) for step in chosen}
    if len(kinds) != 1:
        raise ValueError(f"transition_rows: steps of {len(kinds)} kinds; expected one kind in all rows")
    names = ("t", "t_next", "alpha_t", "sigma_t", "alpha_s", "sigma_s", "eta", "std")
    numbers = {
        name: torch.tensor([getattr(step, name) for step in chosen], dtype=torch.float64) for name in names
    }
    return replace(chosen[0], **numbers)


def step_moments(
    path: Path, transition: Transition, prediction: Tensor, x_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B,C,h,w) and std (B,) of one transition of any sampler but dpmpp, given the prediction.

    A model whose scheduler clips x0 is clipped here too: ddpm then derives eps from the clipped x0, ddim
    keeps the network's eps, as diffusers does.
    """
    if transition.sde is not None:
        return flow_sde_transition(
            x_t,
            prediction,
            sigma=transition.sigma_t,
            sigma_next=transition.sigma_s,
            noise_level=transition.noise_level,
            kind=transition.sde,
            sigma_max=transition.sigma_max,
        )
    x0, eps = path.x0_eps_at(prediction, x_t, transition.alpha_t, transition.sigma_t)
    if path.clip_sample_range is not None:
        x0 = x0.clamp(-path.clip_sample_range, path.clip_sample_range)
        if transition.eps_from_clipped_x0:
            eps = eps_from_x0(x0, x_t, transition.alpha_t, transition.sigma_t)
    return transition.ddim(x0, eps)


def _with_std(path: Path, step: Transition) -> Transition:
    """The step with the std that its kernel gives."""
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    return replace(step, std=float(step_moments(path, step, nothing, nothing)[1]))


def half_log_snr(alpha: float, sigma: float) -> float:
    """log(alpha / sigma), with a floor under alpha for tables that end at zero signal."""
    return math.log(max(alpha, 2.0**-12)) - math.log(sigma)


def _vp_indices(path: Path, name: str, steps: int) -> list[int]:
    """Decreasing level indices. DPM-Solver++ spaces steps + 1 points and leaves the last one to sigma 0."""
    count = path.num_train_timesteps
    points = steps + 1 if name == "dpmpp" else steps
    if path.timestep_spacing == "trailing":
        return [round(count - i * (count / steps)) - 1 for i in range(steps)]
    if path.timestep_spacing == "linspace":
        gap = (count - 1) / max(points - 1, 1)
        rising = [round(i * gap) for i in range(points)]
    else:
        rising = [i * (count // points) + path.steps_offset for i in range(points)]
    return rising[::-1][:steps]


def _vp_transition(path: Path, index: int, following: int, last_abar: float, eta: float) -> Transition:
    abar_t = float(path.table[index])
    abar_s = float(path.table[following]) if following >= 0 else last_abar
    scale = path.num_train_timesteps - 1
    here, there = ((abar**0.5, (1 - abar) ** 0.5) for abar in (abar_t, abar_s))
    return Transition(index / scale, max(following, 0) / scale, *here, *there, eta)


def _flow_grid(path: Path, steps: int) -> list[Transition]:
    plain = 1.0 / path.num_train_timesteps
    ends = {"shifted": float(shifted(plain, path.shift)), "plain": plain, "steps": 1.0 / steps}
    gap = (1.0 - ends[path.lowest_level]) / max(steps - 1, 1)
    sigmas = [*(float(shifted(1.0 - i * gap, path.shift)) for i in range(steps)), 0.0]
    return [Transition(s, r, 1 - s, s, 1 - r, r) for s, r in pairwise(sigmas)]
