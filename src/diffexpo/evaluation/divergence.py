"""How far a version has moved from a reference, in nats per image.

`path_kl` is the number of the reports: the KL between the two *sampling chains*, an upper bound of the KL
between the final images. `elbo_kl` needs no chain and is not a bound. They are different quantities; say
which one a number is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import (
    NoiseSource,
    Path,
    Transition,
    add_noise,
    flow_sde_transition,
    gaussian_kl,
    predict_guided,
    sampler_grid,
    step_moments,
)
from diffexpo.errors import DataError
from diffexpo.phases import phase
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning, Policy

FLOW_NOISE_LEVEL = 0.7


@phase("drawing images")
@torch.no_grad()
def path_kl(
    policy: Policy,
    version: str,
    reference: str,
    conditioning: Conditioning,
    negative: Conditioning | None,
    sampler: SamplerConfig,
    noise: NoiseSource,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """KL between the chains of two versions along a path of the first, one path an image.

        KL = sum_t ||mean_version(x_t) - mean_reference(x_t)||^2 / (2 std_t^2),   x_t drawn from `version`

    Variance-preserving models use the ancestral kernel (eta = 1) on the sampler's number of steps, whatever
    the sampler (a deterministic sampler has no path KL); its last step has no noise and is left out. Flow
    models use the Flow-GRPO form of the SDE at noise level 0.7. Predictions are guided as in sampling,
    `negative` included.

    Args:
        policy: The model; `version` and `reference` are names in its weight sets.
        conditioning, negative: B rows each, negative None without guidance.
        sampler: Steps and guidance of the evaluation sampler.
        noise: Keyed noise of the B paths.
        tick: Called after every step.
    Returns:
        Nats per image (B,), float64, >= 0; exactly 0 for version = reference. Unbiased for the path KL; the
        mean over prompts bounds the KL of the final images from above (data processing).
    Source: EXPO figure 5 (KL axis); ancestral form: DPOK (2023), lemma 4.2; flow form: Flow-GRPO (2025),
        section 4.2, there per element and without the division by its own variance.
    """
    chain = "flow_euler" if policy.path.kind == "flow" else "ddpm"
    grid = sampler_grid(policy.path, chain, sampler.steps, 1.0)
    guidance = sampler.guidance if negative is not None else 1.0
    x = noise.draw().to(policy.device)
    total = torch.zeros(len(x), dtype=torch.float64)
    for transition in grid:
        with policy.weights.use(version):
            own = predict_guided(policy, x, transition.t, conditioning, negative, guidance)
        with policy.weights.use(reference):
            other = predict_guided(policy, x, transition.t, conditioning, negative, guidance)
        mean, std = _moments(policy.path, grid, transition, own, x)
        if float(std.max()) > 0:
            mean_ref, _ = _moments(policy.path, grid, transition, other, x)
            per_element = gaussian_kl(mean.double(), mean_ref.double(), std.double())
            total += (per_element * mean[0].numel()).cpu()
            x = mean + std.reshape(-1, *[1] * (mean.ndim - 1)) * noise.draw().to(mean)
        else:
            x = mean
        tick()
    return total


def kl_estimator(path: Path, sampler: SamplerConfig) -> str:
    """The estimator in words, to be printed with its number."""
    guided = f"guidance {sampler.guidance:g}" if sampler.guidance != 1.0 else "no guidance"
    kernel = "ancestral DDPM kernel, last noiseless step left out"
    if path.kind == "flow":
        kernel = f"Flow-GRPO SDE at noise level {FLOW_NOISE_LEVEL:g}"
    return f"path KL per image ({kernel}; {sampler.steps} steps, {guided})"


@phase("drawing images")
@torch.no_grad()
def elbo_kl(
    policy: Policy,
    version: str,
    reference: str,
    x0: Tensor,
    conditioning: Conditioning,
    noise_key: tuple[str | int, ...],
    *,
    levels: int = 16,
) -> Tensor:
    """Difference of two versions' variational bounds on images of the first: cheap, without chains.

        sum_k 1/2 (snr(t_k-1) - snr(t_k)) [ ||x0_ref(x_t) - x0||^2 - ||x0_version(x_t) - x0||^2 ]
        snr = alpha_t^2 / sigma_t^2

    Args:
        policy: The model; no guidance is used.
        x0: Latents (B,C,h,w) drawn from `version`.
        conditioning: B rows.
        noise_key: Names the noise; level k of row b draws from (noise_key, k, b).
        levels: Number of time intervals, evenly spaced, >= 1.
    Returns:
        Nats per image (B,), float64, of either sign: neither a bound nor a KL of chains, but it serves
        deterministic samplers. Exactly 0 for version = reference.
    Source: variational bound in snr form: Kingma et al., "Variational Diffusion Models" (2021), eq. 15.
    """
    if levels < 1:
        raise DataError(f"elbo_kl: levels = {levels}; expected at least 1")
    lowest = 0.0 if policy.path.kind == "vp" else 1.0 / policy.path.num_train_timesteps
    edges = torch.linspace(lowest, 1.0, levels + 1, dtype=torch.float64)
    alpha, sigma = policy.path.alpha_sigma(edges)
    snr = (alpha / sigma) ** 2
    total = torch.zeros(len(x0), dtype=torch.float64)
    for k in range(1, levels + 1):
        t = edges[k].expand(len(x0))
        generators = [torch_generator(*noise_key, k, b) for b in range(len(x0))]
        eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
        scales = policy.path.alpha_sigma(t)
        x_t = add_noise(x0, eps.to(x0), *scales)
        errors = []
        for name in (reference, version):
            with policy.weights.use(name):
                prediction = policy.predict(x_t, t.to(x0.device, torch.float32), conditioning)
            guess, _ = policy.path.x0_eps_at(prediction.double(), x_t.double(), *scales)
            errors.append((guess - x0.double()).square().flatten(1).sum(dim=1).cpu())
        total += 0.5 * (snr[k - 1] - snr[k]) * (errors[0] - errors[1])
    return total


def _moments(
    path: Path, grid: list[Transition], step: Transition, prediction: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    if path.kind == "vp":
        return step_moments(path, replace(step, eta=1.0), prediction, x)
    largest = grid[1].sigma_t if len(grid) > 1 else 0.5
    return flow_sde_transition(
        x,
        prediction,
        sigma=step.sigma_t,
        sigma_next=step.sigma_s,
        noise_level=FLOW_NOISE_LEVEL,
        sigma_max=largest,
    )
