"""Denoising errors of a policy on given images, with noise that is keyed by what it is for.

Row i of a batch draws its noise and t from its own named generator, so that splitting a batch, reordering it
or spreading it over processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from diffexpo.diffusion.kernels import add_noise, at_least_float32, prediction_error
from diffexpo.diffusion.path import Path
from diffexpo.rng import keyed_uniform, torch_generator
from diffexpo.types import Conditioning, Policy


class NoiseDraw(NamedTuple):
    """Noise eps (B, ...) float32 and times t (B,) float32, on the CPU."""

    eps: Tensor
    t: Tensor

    @staticmethod
    def keyed(
        keys: Sequence[str],
        noise_key: tuple[str | int, ...],
        path: Path,
        shape: Sequence[int],
        timestep_range: tuple[float, float] = (0.0, 1.0),
        draws: int = 1,
    ) -> NoiseDraw:
        """One draw per key, or several; t = low + (high - low) t', with t' distributed as the path says.

        Args:
            keys: Names of the rows, e.g. pair ids.
            noise_key: What the draw is for, e.g. (run seed, iteration, "noise", step).
            path: Says how t' is distributed.
            shape: Of one latent, (C, h, w).
            timestep_range: (low, high), 0 <= low < high <= 1. With a table of levels (vp) t is rounded to its
                nearest level where it is used.
            draws: K >= 1. With several, draw k has the key (noise_key, key, k), and its t' lies in the k-th
                of K slices of equal probability: means over all draws keep their expectation and vary less.
        Returns:
            (eps, t) of K B rows, the first draw of all keys, then the second; a row depends on noise_key, its
            key and its draw only. The range (0, 1) leaves t' as it is, bit for bit; eps does not depend on
            the range.
        Raises:
            ValueError: the range is empty or leaves [0, 1].
        """
        low, high = timestep_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"NoiseDraw.keyed: timestep_range is ({low}, {high}); expected 0 <= low < high <= 1"
            )
        eps, t = [], []
        for draw, key in product(range(draws), keys):
            generator = torch_generator(*noise_key, key, *([draw] if draws > 1 else []))
            eps.append(torch.randn(tuple(shape), generator=generator))
            t.append(path.training_t(1, generator, (draw, draws)))
        # The clamp catches a last-bit excess of the sum, which would be a time beyond the path's end.
        return NoiseDraw(torch.stack(eps), (low + (high - low) * torch.cat(t)).clamp(low, high))


@contextmanager
def under(policy: Policy, version: str) -> Iterator[None]:
    """Inside the block a version of the weights runs; with gradient under "current" alone."""
    has_gradient = torch.is_grad_enabled() and version == "current"
    with policy.weights.use(version), torch.set_grad_enabled(has_gradient):
        yield


@dataclass(frozen=True)
class NoisyImages:
    """Images at a noise and time each: what the network is given, and what it should say."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    target: Tensor
    conditioning: Conditioning

    @staticmethod
    def at(policy: Policy, x0: Tensor, eps: Tensor, t: Tensor, conditioning: Conditioning) -> NoisyImages:
        """x_t = alpha_t x0 + sigma_t eps and the policy's own target there, of B images.

        Raises:
            ValueError: x0, eps, t and conditioning do not have the same number of rows.
        """
        if not len(x0) == len(eps) == len(t) == len(conditioning):
            raise ValueError(
                f"prediction errors: {len(x0)} latents, {len(eps)} noises, {len(t)} times and "
                f"{len(conditioning)} conditionings; all must be equal"
            )
        x0 = at_least_float32(x0)
        eps = eps.to(x0.device, x0.dtype)
        # Scales in float64 from the table, so that they are the same whatever device the latents are on.
        precise_t = t.detach().cpu().to(torch.float64)
        x_t = add_noise(x0, eps, *policy.path.alpha_sigma(precise_t))
        return NoisyImages(x0, x_t, t, policy.path.target(x0, eps, precise_t), conditioning)

    def select(self, index: Tensor) -> NoisyImages:
        """Rows by index, which is on the CPU."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        conditioning = Conditioning(
            {name: rows(tensor) for name, tensor in self.conditioning.tensors.items()}
        )
        return NoisyImages(rows(self.x0), rows(self.x_t), rows(self.t), rows(self.target), conditioning)

    def predict(self, policy: Policy) -> Tensor:
        """Prediction (B,C,h,w) of the weights in use, in float32 or better."""
        return at_least_float32(policy.predict(self.x_t, self.t.to(self.x_t.device), self.conditioning))

    def predict_under(self, policy: Policy, version: str) -> Tensor:
        """Prediction (B,C,h,w) of a version of the weights; with gradient under "current" alone."""
        with under(policy, version):
            return self.predict(policy)

    def error(self, prediction: Tensor) -> Tensor:
        """Mean squared error (B,) of a prediction."""
        return prediction_error(prediction, self.target)

    def error_under(self, policy: Policy, version: str) -> Tensor:
        """Error (B,) of the prediction of a version of the weights."""
        return self.error(self.predict_under(policy, version))


def prediction_errors(
    policy: Policy, x0: Tensor, eps: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """Error of the policy's own prediction at given noise and time, with the weights in use.

    error_b = mean over C,H,W of (predict(alpha_t x0 + sigma_t eps, t, c) - target)^2

    Args:
        policy: Predicts eps, v, x0 or a velocity; the error is in that native space.
        x0: (B,C,h,w) clean scaled latents.
        eps: (B,C,h,w) noise.
        t: (B,) in [0, 1].
        conditioning: B rows.
    Returns:
        (B,) float32 or better. A network that knows x0 gives 0.
    Raises:
        ValueError: x0, eps, t and conditioning do not have the same number of rows.
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14; no classifier-free guidance, as in every forward-process
        loss.
    """
    images = NoisyImages.at(policy, x0, eps, t, conditioning)
    return images.error(images.predict(policy))


def pair_errors(
    policy: Policy, winner: Tensor, loser: Tensor, eps: Tensor, t: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor]:
    """Errors of winners and losers under the same noise, time and prompt, in one forward on [winner; loser].

    Args:
        policy: As in `prediction_errors`.
        winner, loser: (B,C,h,w) clean latents of one prompt each.
        eps: (B,C,h,w) and t (B,): shared by both halves (without sharing, the gap of errors drowns in noise).
        conditioning: B rows, shared too.
    Returns:
        (winner errors (B,), loser errors (B,)). winner equal to loser gives equal errors.
    Source: Diffusion-DPO (arXiv 2311.12908), authors' training code.
    """
    images = noisy_pairs(policy, winner, loser, eps, t, conditioning)
    errors = images.error(images.predict(policy))
    return errors[: len(winner)], errors[len(winner) :]


def noisy_pairs(
    policy: Policy, winner: Tensor, loser: Tensor, eps: Tensor, t: Tensor, conditioning: Conditioning
) -> NoisyImages:
    """[winner; loser], 2B images, whose halves share noise, time and prompt (see `pair_errors`)."""
    both = Conditioning.concatenate([conditioning, conditioning])
    return NoisyImages.at(policy, torch.cat([winner, loser]), torch.cat([eps, eps]), torch.cat([t, t]), both)


def empty_prompt_mask(keys: Sequence[str], noise_key: tuple[str | int, ...], fraction: float) -> Tensor:
    """Which rows are trained with the empty prompt.

    Args:
        keys: Names of the rows.
        noise_key: What the draw is for.
        fraction: Expected share, in [0, 1].
    Returns:
        (B,) bool; a row depends on noise_key and its key only. fraction 0 is all False, 1 all True.
    Source: Diffusion-DPO's `proportion_empty_prompts` (0.2); classifier-free guidance needs the empty prompt
        trained too.
    """
    return torch.tensor(
        [keyed_uniform(*noise_key, key, "empty") < fraction for key in keys], dtype=torch.bool
    )
