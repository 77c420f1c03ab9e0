"""Drawing latents from a policy, and the log-probabilities of what was drawn.

One list of transitions (`sampler_grid`) and one step function (`step_moments`) serve sampling, recorded
trajectories and their replay, so that they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion.guidance import (
    DoubleGuidance,
    classifier_free_guidance,
    double_guidance,
    with_image,
)
from diffexpo.diffusion.kernels import at_least_float32, eps_from_x0, mean_log_prob
from diffexpo.diffusion.transitions import (
    Transition,
    half_log_snr,
    sampler_transitions,
    step_moments,
    stochastic_grid,
    transition_rows,
)
from diffexpo.phases import phase
from diffexpo.types import Conditioning, Policy


class NoiseSource:
    """Standard normal noise for a batch, each row from its own generator: a row's noise ignores its batch."""

    def __init__(self, generators: Sequence[torch.Generator], shape: Sequence[int]) -> None:
        self.generators = tuple(generators)
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self.generators)

    def draw(self) -> Tensor:
        """The next (B, *shape) float32 on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


@dataclass(frozen=True)
class Trajectory:
    """What a sampler visited, from noise to image.

    latents (T+1,B,C,h,w), t (T,), mean_log_probs (T,B), has_density (T,), means (T,B,C,h,w) of the steps.

    A deterministic step (the last one of DDPM) has no density; its log-prob is stored as 0.
    """

    latents: Tensor
    t: Tensor
    mean_log_probs: Tensor
    has_density: Tensor
    means: Tensor


class Guided(NamedTuple):
    """A policy with the conditions that one forward of its guidance takes: B rows without guidance, 2B
    (negative, conditional) or 3B (no condition, image, image and text) with it."""

    policy: Policy
    conditions: Conditioning
    scale: float | DoubleGuidance
    is_negative_fixed: bool = False

    @staticmethod
    def by_text(
        policy: Policy,
        conditioning: Conditioning,
        negative: Conditioning | None,
        scale: float,
        *,
        is_negative_fixed: bool = False,
    ) -> Guided:
        """Guided away from the negative rows, or without guidance where it does not act."""
        if negative is not None and scale != 1.0:
            conditioning = Conditioning.concatenate([negative, conditioning])
        return Guided(policy, conditioning, scale, is_negative_fixed)

    @staticmethod
    def by_image_and_text(
        policy: Policy, text: Conditioning, empty: Conditioning, image: Tensor, scales: DoubleGuidance
    ) -> Guided:
        """Guided by both; where one prediction is all that is needed, its rows alone."""
        only_image, both = with_image(empty, image), with_image(text, image)
        if scales == (1.0, 1.0):
            return Guided(policy, both, scales)
        if scales == (1.0, 0.0):
            return Guided(policy, only_image, scales)
        nothing = with_image(empty, torch.zeros_like(image))
        return Guided(policy, Conditioning.concatenate([nothing, only_image, both]), scales)

    def predict(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The guided prediction (B,C,h,w), in float32 or better, at a number or (B,) t, from one forward."""
        times = torch.as_tensor(t, dtype=torch.float32).expand(len(x_t)).contiguous().to(x_t.device)
        if len(self.conditions) == len(x_t):
            return at_least_float32(self.policy.predict(x_t, times, self.conditions))
        count = len(self.conditions) // len(x_t)
        given = (torch.cat([x_t] * count), torch.cat([times] * count), self.conditions)
        parts = at_least_float32(self.policy.predict(*given)).chunk(count)
        if isinstance(self.scale, DoubleGuidance):
            return double_guidance(*parts, **self.scale._asdict())
        negative, positive = parts
        if self.is_negative_fixed:
            negative = negative.detach()
        return classifier_free_guidance(negative, positive, scale=self.scale)


def num_network_evaluations(sampler: SamplerConfig, guidance_active: bool) -> int:
    """Network evaluations per image: one a step, two with guidance. 50 steps with guidance are 100."""
    return sampler.steps * (2 if guidance_active else 1)


@phase("drawing images")
def predict_guided(
    policy: Policy,
    x_t: Tensor,
    t: float | Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    guidance: float,
    *,
    is_negative_fixed: bool = False,
) -> Tensor:
    """The policy's prediction, guided away from `negative` in one forward of 2B rows.

    Args:
        policy: Denoiser, with the weights in use.
        x_t: (B,C,h,w) at level t in [0, 1], a number or (B,).
        conditioning, negative: B rows each; negative None or guidance 1 runs the conditional half only.
        guidance: Classifier-free guidance scale.
        is_negative_fixed: No gradient flows through the negative half; the value is the same.
    Returns:
        (B,C,h,w) in float32 or better.
    """
    guided = Guided.by_text(policy, conditioning, negative, guidance, is_negative_fixed=is_negative_fixed)
    return guided.predict(x_t, t)


@phase("drawing images")
@torch.no_grad()
def sample_double_guided(
    policy: Policy,
    text: Conditioning,
    empty: Conditioning,
    image: Tensor,
    sampler: SamplerConfig,
    noise: NoiseSource,
    scales: DoubleGuidance,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """As `sample`, with a model that takes an image, guided by image and text in one forward of 3B rows.

    e(0, 0) + image_scale [e(x, 0) - e(0, 0)] + text_scale [e(x, c) - e(x, 0)]

    Args:
        policy: Denoiser that reads the image condition.
        text, empty: B rows each: the prompts c and the empty prompt.
        image: (B,C,h,w) clean latents x.
        sampler: Name, steps and eta; its own guidance scale is not used.
        noise: B rows.
        scales: Of image and text. (1, 1) is e(x, c) and (image 1, text 0) is e(x, 0), each from one forward
            of B rows, bit for bit.
        tick: Called after every step; may raise to stop.
    Returns:
        (B,C,h,w) float32 scaled latents on the policy's device.
    Raises:
        ConfigError: the sampler does not fit the model. ValueError: row counts differ.
    Source: InstructPix2Pix (arXiv 2211.09800) eq. 3; the improvement model's eq. 9.
    """
    _check_rows(text, empty, noise)
    if len(image) != len(noise):
        raise ValueError(
            f"sample_double_guided: {len(image)} images and {len(noise)} noise generators; one of each is "
            "needed"
        )
    return _draw(Guided.by_image_and_text(policy, text, empty, image, scales), sampler, noise, tick)


@phase("drawing images")
@torch.no_grad()
def sample(
    policy: Policy,
    conditioning: Conditioning,
    negative: Conditioning | None,
    sampler: SamplerConfig,
    noise: NoiseSource,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw one latent per row of the conditioning, with the weights in use.

    Args:
        policy: Denoiser.
        conditioning: B rows.
        negative: B rows for guidance (empty or negative prompts), or None for none.
        sampler: Name, steps, guidance and eta.
        noise: B rows; its first draw is the starting noise, the next ones belong to the random steps.
        tick: Called after every step; may raise to stop.
    Returns:
        (B,C,h,w) float32 scaled latents on the policy's device.
    Raises:
        ConfigError: the sampler does not fit the model. ValueError: row counts differ.
    """
    _check_rows(conditioning, negative, noise)
    return _draw(Guided.by_text(policy, conditioning, negative, sampler.guidance), sampler, noise, tick)


@phase("drawing images")
@torch.no_grad()
def sample_trajectory(
    policy: Policy,
    conditioning: Conditioning,
    negative: Conditioning | None,
    sampler: SamplerConfig,
    noise: NoiseSource,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Like `sample`, keeping every latent and the mean log-prob of every step.

    Returns:
        The trajectory; its last latents equal those of `sample` with the same noise.
    Raises:
        ConfigError: the sampler is deterministic, so that its steps have no density.
    Source: DDPO (arXiv 2305.13301) section 4.
    """
    _check_rows(conditioning, negative, noise)
    grid = stochastic_grid(policy.path, sampler)
    guided = Guided.by_text(policy, conditioning, negative, sampler.guidance)
    latents, log_probs, means = [noise.draw().to(policy.device)], [], []
    for transition in grid:
        x = latents[-1]
        mean, std = step_moments(policy.path, transition, guided.predict(x, transition.t), x)
        latents.append(_move(mean, std, transition, noise))
        is_certain = not transition.has_density
        log_probs.append(mean.new_zeros(len(mean)) if is_certain else mean_log_prob(latents[-1], mean, std))
        means.append(mean)
        tick()
    return Trajectory(
        torch.stack(latents),
        torch.tensor([transition.t for transition in grid]),
        torch.stack(log_probs),
        torch.tensor([transition.has_density for transition in grid]),
        torch.stack(means),
    )


class Replayed(NamedTuple):
    """Transitions under the weights in use: log_prob (B,) per latent element, mean (B,C,h,w), std (B,), and
    the guided prediction (B,C,h,w)."""

    log_prob: Tensor
    mean: Tensor
    std: Tensor
    prediction: Tensor


@phase("drawing images")
def replay_transitions(
    policy: Policy,
    sampler: SamplerConfig,
    index: Tensor,
    x_t: Tensor,
    x_next: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    *,
    is_negative_fixed: bool = False,
) -> Replayed:
    """Kernel and log-prob of recorded transitions at any places of the sampler's grid; differentiable.

    Args:
        policy: Denoiser, with the weights in use.
        sampler: The sampler that drew them, guidance included.
        index: (B,) places in its grid, 0 the noisiest; each of a step with a density.
        x_t, x_next: (B,C,h,w) both ends.
        conditioning, negative: B rows each, as when they were drawn.
        is_negative_fixed: No gradient flows through the guidance's negative half.
    Returns:
        The kernel. With the weights, and in the batch, that drew the transitions, log_prob equals what was
        recorded exactly.
    Raises:
        ValueError: a step has no density.
    Source: DDPO (arXiv 2305.13301) section 4; guidance in training as in its authors' code.
    """
    grid = stochastic_grid(policy.path, sampler)
    step = transition_rows(grid, index)
    std = torch.as_tensor(step.std)
    if not bool((std > 0).all()):
        raise ValueError(
            f"replay_transitions: {int((std <= 0).sum())} of {len(index)} steps have no density; leave them "
            "out"
        )
    prediction = predict_guided(
        policy, x_t, step.t, conditioning, negative, sampler.guidance, is_negative_fixed=is_negative_fixed
    )
    mean, std = step_moments(policy.path, step, prediction, x_t)
    return Replayed(mean_log_prob(x_next, mean, std), mean, std, prediction)


def _draw(guided: Guided, sampler: SamplerConfig, noise: NoiseSource, tick: Callable[[], None]) -> Tensor:
    path = guided.policy.path
    grid = sampler_transitions(path, sampler)
    x = noise.draw().to(guided.policy.device)
    if sampler.name == "dpmpp":
        return _sample_dpmpp(guided, grid, x, tick)
    for transition in grid:
        mean, std = step_moments(path, transition, guided.predict(x, transition.t), x)
        x = _move(mean, std, transition, noise)
        tick()
    return x


def _sample_dpmpp(guided: Guided, grid: list[Transition], x: Tensor, tick: Callable[[], None]) -> Tensor:
    """DPM-Solver++(2M), midpoint, first order at both ends.

    D = x0 + (x0 - x0_before) / (2 r), r = (lambda_t - lambda_before) / (lambda_s - lambda_t), lambda =
    log(alpha / sigma); then the deterministic transition with D for x0 and the eps that belongs to it.

    Source: arXiv 2211.01095 algorithm 2; written through the DDIM kernel, which is its first-order step.
    """
    before: tuple[Tensor, float] | None = None
    for step in grid:
        prediction = guided.predict(x, step.t)
        x0, _ = guided.policy.path.x0_eps_at(prediction, x, step.alpha_t, step.sigma_t)
        log_snr = half_log_snr(step.alpha_t, step.sigma_t)
        extrapolated = x0
        if before is not None and step.sigma_s > 0:
            ratio = (log_snr - before[1]) / (half_log_snr(step.alpha_s, step.sigma_s) - log_snr)
            extrapolated = x0 + (0.5 / ratio) * (x0 - before[0])
        x, _ = step.ddim(extrapolated, eps_from_x0(extrapolated, x, step.alpha_t, step.sigma_t))
        before = (x0, log_snr)
        tick()
    return x


def _move(mean: Tensor, std: Tensor, transition: Transition, noise: NoiseSource) -> Tensor:
    """Where the step goes; noise is drawn only by a step that uses it."""
    if not transition.has_density:
        return mean
    return mean + std.reshape(-1, *[1] * (mean.ndim - 1)) * noise.draw().to(mean.device)


def _check_rows(conditioning: Conditioning, negative: Conditioning | None, noise: NoiseSource) -> None:
    if len(conditioning) != len(noise) or (negative is not None and len(negative) != len(noise)):
        raise ValueError(
            f"sample: {len(conditioning)} conditionings, {'no' if negative is None else len(negative)} "
            f"negatives and {len(noise)} noise generators; one of each per image is needed"
        )
