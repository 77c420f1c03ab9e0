"""What all methods on pairs share: the four errors of a pair, its metrics, and its gradient without holding
two graphs.

joint      one forward of the policy on [winner; loser], one backward
in parts   slopes q_w = dL/de_w and q_l = dL/de_l from a pass without gradient, then q_w e_w and q_l e_l one
after the other

Both have the same gradient. In parts, the activations of one half are held at a time; the policy runs once
more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffexpo.algorithms.forward import (
    KeyedNoise,
    Metrics,
    NoiseKey,
    as_metrics,
    share_above_zero,
)
from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.diffusion.objectives import NoiseDraw, pair_errors, prediction_errors
from diffexpo.types import Conditioning, LossOutput, PairBatch, Policy


@dataclass(frozen=True)
class PairErrors:
    """Errors (B,) of policy and, where the loss needs them, reference on winners and losers."""

    winner: Tensor
    loser: Tensor
    winner_ref: Tensor | None
    loser_ref: Tensor | None

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, of a method whose card names the reference."""
        assert self.winner_ref is not None and self.loser_ref is not None
        return self.winner, self.loser, self.winner_ref, self.loser_ref


Objective = Callable[[PairErrors], tuple[Tensor, Metrics]]


class PairMethod(ABC):
    """A method whose loss is a mean over pairs of a function of their errors, which a subclass gives
    (`losses_of_errors`)."""

    settings: ForwardConfig

    def __init__(self, settings: ForwardConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        self.settings = settings
        self.noise = KeyedNoise(settings, empty)

    @abstractmethod
    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """Loss (B,) of each pair before its weight, and the metrics of the errors."""

    def loss(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean loss over the batch's pairs and its metrics; noise is keyed by (noise_key, pair key)."""
        per_pair, metrics = self.pair_losses(policy, batch, noise_key)
        return LossOutput(*_mean(per_pair, metrics))

    def pair_losses(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> tuple[Tensor, Metrics]:
        """Weighted loss (B,) of each pair and the metrics of the errors."""
        errors = self.measure_pairs(policy, batch, *self.situation(policy, batch, noise_key))
        return self._weighted(errors, batch)

    def loss_in_parts(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> Iterator[LossOutput]:
        """The loss as two parts, of winners and of losers; call backward on the first before asking for the
        second."""
        draw, conditioning = self.situation(policy, batch, noise_key)
        with torch.no_grad():
            errors = self.measure_pairs(policy, batch, draw, conditioning)
        yield from in_parts(
            policy,
            (batch.winner, batch.loser),
            draw,
            conditioning,
            errors,
            lambda errors: _mean(*self._weighted(errors, batch)),
        )

    def situation(
        self, policy: Policy, batch: PairBatch, noise_key: NoiseKey
    ) -> tuple[NoiseDraw, Conditioning]:
        """Noise, times and prompts that winner and loser, policy and reference share."""
        draw = self.noise.draw(policy, batch.keys, noise_key, batch.winner.shape[1:])
        return draw, self.noise.with_empty_prompts(batch.conditioning, batch.keys, noise_key)

    def measure_pairs(
        self, policy: Policy, batch: PairBatch, draw: NoiseDraw, conditioning: Conditioning
    ) -> PairErrors:
        """The errors that `losses_of_errors` is given."""
        return measure_errors(
            policy,
            batch.winner,
            batch.loser,
            draw,
            conditioning,
            needs_reference=self.settings.needs_reference,
        )

    def _weighted(self, errors: PairErrors, batch: PairBatch) -> tuple[Tensor, Metrics]:
        per_pair, metrics = self.losses_of_errors(errors, batch)
        if batch.weight is not None:
            per_pair = per_pair * batch.weight.to(per_pair)
        return per_pair, metrics


def measure_errors(
    policy: Policy,
    winner: Tensor,
    loser: Tensor,
    draw: NoiseDraw,
    conditioning: Conditioning,
    *,
    needs_reference: bool = True,
) -> PairErrors:
    """Errors under "current" with gradient and "reference" without, at the same noise, time and prompts."""
    with policy.weights.use("current"):
        current = pair_errors(policy, winner, loser, draw.eps, draw.t, conditioning)
    if not needs_reference:
        return PairErrors(*current, None, None)
    return PairErrors(*current, *reference_errors(policy, winner, loser, draw, conditioning))


def reference_errors(
    policy: Policy, winner: Tensor, loser: Tensor, draw: NoiseDraw, conditioning: Conditioning
) -> tuple[Tensor, Tensor]:
    """Errors (B,) of the reference on winners and losers, without gradient."""
    with torch.no_grad(), policy.weights.use("reference"):
        return pair_errors(policy, winner, loser, draw.eps, draw.t, conditioning)


def in_parts(
    policy: Policy,
    latents: tuple[Tensor, Tensor],
    draw: NoiseDraw,
    conditioning: Conditioning,
    errors: PairErrors,
    objective: Objective,
) -> Iterator[LossOutput]:
    """An objective of pair errors as two losses, whose values and gradients add up to its own.

    Args:
        policy: Runs "current" once with gradient for each half.
        latents: (winners, losers), each (B,C,h,w).
        draw, conditioning: Those that the errors were measured with.
        errors: Of policy and reference, measured without gradient.
        objective: Errors to (scalar, metrics).
    Returns:
        Two losses in turn: the first has the objective's value and the winners' gradient, the second value 0
        and the losers'. The graph of the second is built when it is asked for.
    """
    winner, loser = (error.detach().requires_grad_() for error in (errors.winner, errors.loser))
    value, metrics = objective(replace(errors, winner=winner, loser=loser))
    slopes = torch.autograd.grad(value, [winner, loser], allow_unused=True, materialize_grads=True)
    shown = value.detach()
    for half, slope in zip(latents, slopes, strict=True):
        with policy.weights.use("current"):
            error = prediction_errors(policy, half, draw.eps, draw.t, conditioning)
        yield LossOutput(shown + (slope * (error - error.detach())).sum(), metrics)
        shown, metrics = torch.zeros_like(shown), {}


def error_metrics(errors: PairErrors, margin: Tensor, beta: Tensor | float) -> Metrics:
    """Accuracy, margin, errors and, where there is a reference, implicit rewards -beta/2 (error -
    error_ref)."""
    winner, loser = errors.winner.detach(), errors.loser.detach()
    values = {
        "train/implicit_accuracy": share_above_zero(margin),
        "train/margin": margin,
        "train/winner_error": winner,
        "train/loser_error": loser,
    }
    if errors.winner_ref is not None and errors.loser_ref is not None:
        values["train/winner_reference_error"] = errors.winner_ref
        values["train/loser_reference_error"] = errors.loser_ref
        values["train/implicit_reward_winner"] = -0.5 * beta * (winner - errors.winner_ref)
        values["train/implicit_reward_loser"] = -0.5 * beta * (loser - errors.loser_ref)
    return as_metrics(values)


def _mean(per_pair: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    loss = per_pair.mean()
    return loss, metrics | {"train/loss": (loss.detach() * len(per_pair), len(per_pair))}
