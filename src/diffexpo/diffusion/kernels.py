"""Pure functions on latents: noising, conversions between predictions, transition kernels, their densities.

Latents are (B, ...) tensors; `alpha_t, sigma_t, sigma, std, eta, ...` are numbers or (B,) tensors and
broadcast over a latent's elements. float64 in gives float64 out; half precision is raised to float32, because
a Diffusion-DPO logit multiplies differences of these errors by thousands. Schedule arithmetic inside the
kernels is float64 whatever the latents are.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

Coefficient = Tensor | float
FlowSdeKind = Literal["flow_grpo", "dance", "cps"]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample.

    error_b = mean over C,H,W of (prediction - target)^2, in float32 or better.

    Args:
        prediction: (B, ...) the network's output.
        target: (B, ...) what it should have been; same shape.
    Returns:
        (B,) non-negative. All ones against all zeros is 1.
    Raises:
        ValueError: the shapes differ (broadcasting would average over the wrong elements).
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14, with the sum over elements replaced by the mean, as in
        the authors' code.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; they must be "
            "equal"
        )
    difference = at_least_float32(prediction) - at_least_float32(target)
    return difference.square().flatten(1).mean(dim=1)


def add_noise(x0: Tensor, eps: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """Noised latent x_t = alpha_t x0 + sigma_t eps.

    Args:
        x0: (B, ...) clean latents, already multiplied by the VAE's scaling factor.
        eps: (B, ...) standard normal noise.
        alpha_t, sigma_t: signal and noise scale, number or (B,).
    Returns:
        (B, ...). alpha_t 1 and sigma_t 0 returns x0.
    Source: DDPM (arXiv 2006.11239) eq. 4; rectified flow (arXiv 2209.03003) with alpha_t = 1 - t, sigma_t =
        t.
    """
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    return _spread(alpha_t, x0) * x0 + _spread(sigma_t, x0) * eps


def v_target(x0: Tensor, eps: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """What a v-predicting network should output, v = alpha_t eps - sigma_t x0.

    Args:
        x0, eps: (B, ...) clean latents and noise.
        alpha_t, sigma_t: variance-preserving scales (alpha_t^2 + sigma_t^2 = 1), number or (B,).
    Returns:
        (B, ...). At alpha_t 1, sigma_t 0 it is eps.
    Source: Progressive distillation (arXiv 2202.00512), appendix D.
    """
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    return _spread(alpha_t, x0) * eps - _spread(sigma_t, x0) * x0


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """What a flow-matching network should output, u = eps - x0 (from data towards noise).

    Args:
        x0, eps: (B, ...) clean latents and noise.
    Returns:
        (B, ...). x0 = 0 gives eps.
    Source: Rectified flow (arXiv 2209.03003) eq. 1, in SD3's direction of time (t = 1 is noise).
    """
    return at_least_float32(eps) - at_least_float32(x0)


def eps_from_v(v: Tensor, x_t: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """Noise implied by a v-prediction, eps = alpha_t v + sigma_t x_t (variance-preserving paths only).

    Args:
        v, x_t: (B, ...) prediction and the latent it was made from.
        alpha_t, sigma_t: number or (B,), alpha_t^2 + sigma_t^2 = 1.
    Returns:
        (B, ...). With the exact v it is the eps that made x_t; errors obey mse_eps = alpha_t^2 mse_v.
    Source: Progressive distillation (arXiv 2202.00512), appendix D.
    """
    v, x_t = at_least_float32(v), at_least_float32(x_t)
    return _spread(alpha_t, x_t) * v + _spread(sigma_t, x_t) * x_t


def x0_from_v(v: Tensor, x_t: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """Clean latent implied by a v-prediction, x0 = alpha_t x_t - sigma_t v (variance-preserving paths only).

    Args:
        v, x_t: (B, ...) prediction and the latent it was made from.
        alpha_t, sigma_t: number or (B,), alpha_t^2 + sigma_t^2 = 1.
    Returns:
        (B, ...). With the exact v it is x0; errors obey mse_x0 = sigma_t^2 mse_v.
    Source: Progressive distillation (arXiv 2202.00512), appendix D.
    """
    v, x_t = at_least_float32(v), at_least_float32(x_t)
    return _spread(alpha_t, x_t) * x_t - _spread(sigma_t, x_t) * v


def x0_from_eps(eps: Tensor, x_t: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """Clean latent implied by a noise prediction, x0 = (x_t - sigma_t eps) / alpha_t.

    Args:
        eps, x_t: (B, ...) predicted noise and the latent it was predicted from.
        alpha_t, sigma_t: number or (B,); alpha_t must not be 0.
    Returns:
        (B, ...). sigma_t 0 and alpha_t 1 returns x_t.
    Source: DDIM (arXiv 2010.02502) eq. 9.
    """
    eps, x_t = at_least_float32(eps), at_least_float32(x_t)
    return (x_t - _spread(sigma_t, x_t) * eps) / _spread(alpha_t, x_t)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha_t: Coefficient, sigma_t: Coefficient) -> Tensor:
    """Noise implied by a clean latent, eps = (x_t - alpha_t x0) / sigma_t.

    Args:
        x0, x_t: (B, ...) clean latent and its noised version.
        alpha_t, sigma_t: number or (B,); sigma_t must not be 0.
    Returns:
        (B, ...). alpha_t 0 and sigma_t 1 returns x_t.
    Source: DDPM (arXiv 2006.11239) eq. 4, solved for eps.
    """
    x0, x_t = at_least_float32(x0), at_least_float32(x_t)
    return (x_t - _spread(alpha_t, x_t) * x0) / _spread(sigma_t, x_t)


def x0_from_velocity(velocity: Tensor, x_t: Tensor, sigma: Coefficient) -> Tensor:
    """Clean latent implied by a flow velocity, x0 = x_t - sigma u.

    Args:
        velocity, x_t: (B, ...) predicted u and the latent it was predicted from.
        sigma: number or (B,) in [0, 1]; x_t = (1 - sigma) x0 + sigma eps.
    Returns:
        (B, ...). sigma 0 returns x_t; errors obey mse_x0 = sigma^2 mse_u.
    Source: Rectified flow (arXiv 2209.03003).
    """
    velocity, x_t = at_least_float32(velocity), at_least_float32(x_t)
    return x_t - _spread(sigma, x_t) * velocity


def eps_from_velocity(velocity: Tensor, x_t: Tensor, sigma: Coefficient) -> Tensor:
    """Noise implied by a flow velocity, eps = x_t + (1 - sigma) u.

    Args:
        velocity, x_t: (B, ...) predicted u and the latent it was predicted from.
        sigma: number or (B,) in [0, 1]; x_t = (1 - sigma) x0 + sigma eps.
    Returns:
        (B, ...). sigma 1 returns x_t; errors obey mse_eps = (1 - sigma)^2 mse_u.
    Source: Rectified flow (arXiv 2209.03003).
    """
    velocity, x_t = at_least_float32(velocity), at_least_float32(x_t)
    return x_t + (1 - _spread(sigma, x_t)) * velocity


def ddim_transition(
    x0: Tensor,
    eps: Tensor,
    *,
    alpha_t: Coefficient,
    sigma_t: Coefficient,
    alpha_s: Coefficient,
    sigma_s: Coefficient,
    eta: Coefficient,
) -> tuple[Tensor, Tensor]:
    """Gaussian step from level t to the less noisy level s, for DDIM(eta), DDPM (eta 1), flow-Euler (eta 0).

    std^2 = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)
    mean  = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps

    Args:
        x0, eps: (B, ...) predicted clean latent and noise, with x_t = alpha_t x0 + sigma_t eps.
        alpha_t, sigma_t: scales at t, number or (B,); sigma_t > 0.
        alpha_s, sigma_s: scales at s; alpha_s > 0.
        eta: 0 deterministic .. 1 the posterior of the forward process.
    Returns:
        mean (B, ...) and std (B,). eta 0, or sigma_s 0, gives std 0, a step without density; with alpha = 1 -
        sigma and eta 0 it is the Euler step of the flow ODE.
    Source: DDIM (arXiv 2010.02502) eq. 12 and 16. Written for any (alpha, sigma), not only alpha^2 + sigma^2
        = 1, where it reduces to the paper's (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s).
    """
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    alpha_t, sigma_t, alpha_s, sigma_s, eta = (_double(c) for c in (alpha_t, sigma_t, alpha_s, sigma_s, eta))
    # Clamped at 0 because rounding can leave -1e-17 under the roots.
    forward_variance = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0)
    std = eta * (sigma_s / sigma_t) * torch.sqrt(forward_variance)
    direction = torch.sqrt((sigma_s**2 - std**2).clamp(min=0))
    mean = _spread(alpha_s, x0) * x0 + _spread(direction, x0) * eps
    return mean, _per_sample(std, x0)


def flow_sde_transition(
    x_t: Tensor,
    velocity: Tensor,
    *,
    sigma: Coefficient,
    sigma_next: Coefficient,
    noise_level: Coefficient,
    kind: FlowSdeKind = "flow_grpo",
    sigma_max: Coefficient | None = None,
) -> tuple[Tensor, Tensor]:
    """Stochastic step of a flow model from sigma to sigma_next < sigma, with (for small steps) the ODE's
    marginals.

    dt = sigma_next - sigma
    flow_grpo: g = a sqrt(sigma / (1 - sigma)),
               mean = x_t (1 + g^2 dt / (2 sigma)) + u (1 + g^2 (1 - sigma) / (2 sigma)) dt, std = g sqrt(-dt)
    dance:     score = -(x_t - (1 - sigma) x0) / sigma^2, std = eta sqrt(-dt),
               mean = x_t + u dt - eta^2 / 2 score dt
    cps:       std = sigma_next sin(a pi / 2), mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) eps

    Args:
        x_t, velocity: (B, ...) latent and predicted u = eps - x0.
        sigma, sigma_next: number or (B,), 1 >= sigma > sigma_next >= 0.
        noise_level: a (flow_grpo, cps) or eta (dance), number or (B,); 0 is the ODE.
        kind: which SDE.
        sigma_max: flow_grpo only: stands in for sigma under the root where sigma is 1 (the schedule's
            sigmas[1]).
    Returns:
        mean (B, ...) and std (B,), whole: sqrt(-dt) is inside. noise_level 0 gives x_t + u dt and std 0.
    Raises:
        ValueError: an unknown kind, or flow_grpo at sigma 1 without sigma_max.
    Source: Flow-GRPO (arXiv 2505.05470) eq. 9, DanceGRPO (arXiv 2505.07818) eq. 7, Flow-CPS (arXiv
        2509.05952). The sigma_max rule is that of Flow-GRPO's code; its std excludes sqrt(-dt), ours includes
        it.
    """
    x_t, velocity = at_least_float32(x_t), at_least_float32(velocity)
    sigma, sigma_next, level = _double(sigma), _double(sigma_next), _double(noise_level)
    dt = sigma_next - sigma
    if kind == "flow_grpo":
        inner = sigma
        if sigma_max is not None:
            inner = torch.where(sigma >= 1, _double(sigma_max).to(sigma.device), sigma)
        elif bool((sigma >= 1).any()):
            raise ValueError(
                "flow_sde_transition: sigma is 1, where flow_grpo's noise is infinite; pass "
                "sigma_max=sigmas[1]"
            )
        variance_rate = level**2 * sigma / (1 - inner)
        keep = 1 + variance_rate * dt / (2 * sigma)
        push = (1 + variance_rate * (1 - sigma) / (2 * sigma)) * dt
        mean = _spread(keep, x_t) * x_t + _spread(push, x_t) * velocity
        return mean, _per_sample(torch.sqrt(variance_rate * -dt), x_t)
    if kind == "dance":
        x0 = x0_from_velocity(velocity, x_t, sigma)
        score = -(x_t - _spread(1 - sigma, x_t) * x0) / _spread(sigma**2, x_t)
        mean = x_t + _spread(dt, x_t) * velocity - _spread(0.5 * level**2 * dt, x_t) * score
        return mean, _per_sample(level * torch.sqrt(-dt), x_t)
    if kind == "cps":
        x0, eps = x0_from_velocity(velocity, x_t, sigma), eps_from_velocity(velocity, x_t, sigma)
        std = sigma_next * torch.sin(level * math.pi / 2)
        direction = torch.sqrt((sigma_next**2 - std**2).clamp(min=0))
        mean = _spread(1 - sigma_next, x_t) * x0 + _spread(direction, x_t) * eps
        return mean, _per_sample(std, x_t)
    raise ValueError(f"flow_sde_transition: kind is {kind!r}; expected 'flow_grpo', 'dance' or 'cps'")


def mean_log_prob(x: Tensor, mean: Tensor, std: Coefficient) -> Tensor:
    """Gaussian log density of each sample, averaged per latent element.

    mean over C,H,W of -(x - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)

    Args:
        x: (B, ...) where the transition went. Detach it when the gradient is to reach the mean only.
        mean: (B, ...) of the transition.
        std: number or (B,), > 0; a deterministic step (std 0) has no density and gives nan or inf.
    Returns:
        (B,). x = mean with std 1 gives -log sqrt(2 pi) = -0.9189385.
    Source: DDPO (arXiv 2305.13301) eq. 4; the mean instead of the sum is the authors' code and what the
        field's clip ranges assume (the true log-ratio is C*H*W times larger).
    """
    x, mean = at_least_float32(x), at_least_float32(mean)
    scale = _spread(_double(std), mean)
    density = -(x - mean).square() / (2 * scale**2) - torch.log(scale) - math.log(math.sqrt(2 * math.pi))
    return density.flatten(1).mean(dim=1)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Coefficient) -> Tensor:
    """KL between two Gaussian steps of equal std, averaged per latent element.

    mean over C,H,W of (mean - mean_ref)^2 / (2 std^2), in nats per element; times C*H*W it is the step's KL.

    Args:
        mean, mean_ref: (B, ...) of policy and reference.
        std: number or (B,), > 0, shared by both.
    Returns:
        (B,). Equal means give 0; a distance of one std gives 1/2.
    Source: DPOK (arXiv 2305.16381) eq. 4. Flow-GRPO's own KL is this times (-dt).
    """
    variance = _double(std).to(mean.device, at_least_float32(mean).dtype) ** 2
    return prediction_error(mean, mean_ref) / (2 * variance)


def _double(value: Coefficient) -> Tensor:
    """float64 for schedule arithmetic, where the device has it (Apple's does not)."""
    if isinstance(value, Tensor):
        return value if value.device.type == "mps" else value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64)


@overload
def _spread(value: float, like: Tensor) -> float: ...
@overload
def _spread(value: Tensor, like: Tensor) -> Tensor: ...
def _spread(value: Coefficient, like: Tensor) -> Coefficient:
    """A number as it is; a 0-dim or (B,) tensor in the latents' precision, shaped to multiply them."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(at_least_float32(like).dtype)
    if value.ndim == 0:  # a CPU scalar multiplies tensors of any device without a copy
        return value if value.device.type == "cpu" else value.to(like.device)
    return value.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """One number per sample of `like`, in its precision."""
    return value.to(like.device, like.dtype).expand(len(like))
