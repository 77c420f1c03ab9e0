"""What all methods on pairs share: the four errors of a pair, its metrics, and its gradient without holding
two graphs.

joint      one forward of the policy on [winner; loser], one backward
in parts   slopes q_w = dL/de_w and q_l = dL/de_l from a pass without gradient, then q_w e_w and q_l e_l one
after the other (and so with the distances from the anchor, if there is one)

Both have the same gradient. In parts, the activations of one half are held at a time; the policy runs once
more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffexpo.algorithms.anchor import Anchor
from diffexpo.algorithms.forward import (
    ForwardMethod,
    Metrics,
    NoiseKey,
    RowLosses,
    as_metrics,
    mean_output,
    share_above_zero,
    squared_distance,
    weighted,
)
from diffexpo.config.methods.bases import DISTANCE, ForwardConfig
from diffexpo.diffusion.objectives import NoiseDraw, NoisyImages, noisy_pairs
from diffexpo.errors import ConfigError
from diffexpo.rng import keyed_uniform
from diffexpo.types import Conditioning, LossOutput, PairBatch, Policy


class NoisyPairs(NamedTuple):
    """Winners and losers (B,C,h,w) with the prompts, noise and times that both share. Of K draws of noise and
    time the first B rows of `draw` are those of all pairs, then come the second ones. `held` are the rows of
    a half that an anchor holds, M of each pair's K in the same order; None: all."""

    winner: Tensor
    loser: Tensor
    draw: NoiseDraw
    conditioning: Conditioning
    held: Tensor | None = None

    def both(self, policy: Policy) -> NoisyImages:
        """[winner; loser], each at every draw: 2 K B images."""
        return noisy_pairs(policy, self._many(self.winner), self._many(self.loser), *self.draw, self._prompts)

    def half(self, policy: Policy, latents: Tensor) -> NoisyImages:
        """The winners or the losers at every draw: K B images."""
        return NoisyImages.at(policy, self._many(latents), *self.draw, self._prompts)

    def by_pair(self, rows: Tensor) -> Tensor:
        """K B rows as (B, K, ...), for any K."""
        return rows.reshape(-1, len(self.winner), *rows.shape[1:]).transpose(0, 1)

    def mean(self, rows: Tensor) -> Tensor:
        """Mean (B,) over the draws of K B numbers, for any K."""
        return rows if len(rows) == len(self.winner) else self.by_pair(rows).mean(dim=1)

    def held_of_half(self, rows: Tensor) -> Tensor:
        """The rows of a half (K B, ...) that an anchor holds, (M B, ...)."""
        return rows if self.held is None else rows[self.held.to(rows.device)]

    def held_of_both(self, rows: Tensor) -> Tensor:
        """The rows of both halves (2 K B, ...) that an anchor holds, (2 M B, ...)."""
        return rows if self.held is None else torch.cat([self.held_of_half(half) for half in rows.chunk(2)])

    @property
    def _num_draws(self) -> int:
        return len(self.draw.t) // len(self.winner)

    @property
    def _prompts(self) -> Conditioning:
        count = self._num_draws
        return self.conditioning if count == 1 else Conditioning.concatenate([self.conditioning] * count)

    def _many(self, latents: Tensor) -> Tensor:
        return latents if self._num_draws == 1 else torch.cat([latents] * self._num_draws)


@dataclass(frozen=True)
class PairErrors:
    """Errors (B,) of policy and, where the loss needs them, reference on winners and losers, means over a
    pair's draws of noise and time, and metrics (B,) of how far the one's predictions are from the other's;
    with a safeguard the scale (B,) of each loser's gradient; with an anchor its predictions of
    `NoisyPairs.both` and the pair's mean squared distance (B,) from them, with a proximal term the same of
    the reference."""

    winner: Tensor
    loser: Tensor
    winner_ref: Tensor | None = None
    loser_ref: Tensor | None = None
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    loser_scale: Tensor | None = None
    distance: Tensor | None = None
    anchor: Tensor | None = None
    from_reference: Tensor | None = None
    reference: Tensor | None = None

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, of a method whose card names the reference."""
        assert self.winner_ref is not None and self.loser_ref is not None
        return self.winner, self.loser, self.winner_ref, self.loser_ref


class PairMethod(ForwardMethod, ABC):
    """A method whose loss is a mean over pairs of a function of their errors, which a subclass gives
    (`losses_of_errors`)."""

    def __init__(self, settings: ForwardConfig, empty: Conditioning | None = None) -> None:
        """`empty`: as of `ForwardMethod`; an anchor to the guided base needs it too."""
        super().__init__(settings, empty)
        self.anchor = anchor_of(settings, empty)

    @abstractmethod
    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """Loss (B,) of each pair before its weight, and metrics pair by pair."""

    def loss(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean loss over the batch's pairs and its metrics; noise is keyed by (noise_key, pair key)."""
        return mean_output(*self.pair_losses(policy, batch, noise_key))

    def pair_losses(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> tuple[Tensor, Metrics]:
        """Weighted loss (B,) of each pair and the metrics of the errors."""
        return self._weighted(self.measure_pairs(policy, self.noised(policy, batch, noise_key)), batch)

    def loss_in_parts(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> Iterator[LossOutput]:
        """The loss as two parts, of winners and of losers; call backward on the first before asking for the
        second."""
        pairs = self.noised(policy, batch, noise_key)
        with torch.no_grad():
            errors = self.measure_pairs(policy, pairs)
        yield from in_parts(policy, pairs, errors, lambda errors: mean_output(*self._weighted(errors, batch)))

    @torch.no_grad()
    def margins(
        self, policy: Policy, batch: PairBatch, noise_key: NoiseKey, draws: int, *, is_changed: bool
    ) -> Tensor:
        """Margins (B, draws) of single draws of noise and time, as `MeasuresMargins` says.

        e_l - e_w, or what the policy changed of it, (e_l - e_w) - (e_l_ref - e_w_ref); each draw is one of
        the whole `timestep_range`, and a pair keeps its prompt, empty or not, in all of them.
        """
        conditioning, found = self.with_empty_prompts(batch.conditioning, batch.keys, noise_key), []
        for number in range(draws):
            draw = self.draw_noise(policy, batch.keys, (*noise_key, number), batch.winner)
            pairs = NoisyPairs(batch.winner, batch.loser, draw, conditioning)
            seen = predict_pairs(policy, pairs, needs_reference=is_changed).errors()
            margin = seen.loser - seen.winner
            if seen.loser_ref is not None and seen.winner_ref is not None:
                margin = margin - (seen.loser_ref - seen.winner_ref)
            found.append(margin)
        return torch.stack(found, dim=1)

    def noised(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> NoisyPairs:
        """The batch's pairs at their noise, times and prompts."""
        draw = self.draw_noise(policy, batch.keys, noise_key, batch.winner, self.settings.data.draws)
        conditioning = self.with_empty_prompts(batch.conditioning, batch.keys, noise_key)
        held = held_rows(batch.keys, noise_key, self.settings.data.draws, self.settings.held_draws)
        return NoisyPairs(batch.winner, batch.loser, draw, conditioning, held)

    def measure_pairs(self, policy: Policy, pairs: NoisyPairs) -> PairErrors:
        """The errors that `losses_of_errors` is given."""
        seen = predict_pairs(policy, pairs, needs_reference=self.settings.needs_reference)
        errors = self.errors_of(seen)
        if self.settings.proximal > 0 and seen.reference is not None:
            away = seen.of_pair(squared_distance(seen.current, seen.reference))
            errors = replace(errors, from_reference=away, reference=seen.reference)
        if self.anchor is None:
            return errors
        held = seen.held()
        anchor = self.anchor.predict(policy, held.images, held.reference)
        distance = held.of_pair(squared_distance(held.current, anchor))
        return replace(errors, distance=distance, anchor=anchor, moved={**errors.moved, **held.goal(anchor)})

    def errors_of(self, seen: PairPredictions) -> PairErrors:
        """The errors of predictions; what else a loss takes from them, a subclass adds."""
        return seen.errors()

    def after_step(self, policy: Policy, step: int) -> None:
        """r <- d r + (1 - d) p of a reference that follows every optimiser step."""
        if "reference" in self.settings.moving_versions:
            policy.weights.follow("reference", "current", self.settings.reference_memory or 0.0)

    def beta_of(self, errors: PairErrors, batch: PairBatch) -> float:
        """beta, in whose half the anchor is weighed; only losses of a multiple of the margin have one."""
        return 2.0 * (self.settings.logit_scale or 0.0)

    def _weighted(self, errors: PairErrors, batch: PairBatch) -> tuple[Tensor, Metrics]:
        per_pair, values = self.losses_of_errors(errors, batch)
        if errors.from_reference is not None:
            pull = 0.5 * self.settings.proximal * self.beta_of(errors, batch)
            per_pair = per_pair + pull * errors.from_reference
        if self.anchor is not None and errors.distance is not None:
            pull = 0.5 * self.anchor.weight * self.beta_of(errors, batch)
            per_pair = per_pair + pull * errors.distance
            values = {**values, "train/anchor_distance": errors.distance}
        metrics = as_metrics(values) | as_metrics(errors.moved) | common_part(errors)
        return weighted(per_pair, batch.weight), metrics


@dataclass(frozen=True)
class PairPredictions:
    """What policy and, where the loss needs it, reference predict of `images`, [winner; loser] at every
    draw."""

    pairs: NoisyPairs
    images: NoisyImages
    current: Tensor
    reference: Tensor | None

    def held(self) -> PairPredictions:
        """Those of the draws that an anchor holds."""
        if self.pairs.held is None:
            return self
        select = self.pairs.held_of_both
        reference = None if self.reference is None else select(self.reference)
        index = select(torch.arange(len(self.current)))
        return replace(
            self, images=self.images.select(index), current=select(self.current), reference=reference
        )

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means (B,) over the draws of winners and of losers, of a number for each image."""
        winner, loser = rows.chunk(2)
        return self.pairs.mean(winner), self.pairs.mean(loser)

    def of_pair(self, rows: Tensor) -> Tensor:
        """Mean (B,) over the draws and both images of a pair."""
        winner, loser = self.halves(rows)
        return 0.5 * (winner + loser)

    def errors(self) -> PairErrors:
        """The errors of both, or of the policy alone."""
        current = self.halves(self.images.error(self.current))
        if self.reference is None:
            return PairErrors(*current)
        seen, reference = self.current.detach(), self.halves(self.images.error(self.reference))
        moved = {
            "train/prediction_norm_ratio": self._norm_ratio(seen, self.reference),
            DISTANCE: self.of_pair(squared_distance(seen, self.reference)),
        }
        return PairErrors(*current, *reference, moved=moved)

    def goal(self, anchor: Tensor) -> dict[str, Tensor]:
        """Errors (B,) of an anchor's predictions, and their norm against the reference's: what a policy that
        has followed the anchor to its end would have."""
        metrics = {"train/anchor_error": self.of_pair(self.images.error(anchor))}
        if self.reference is not None:
            metrics["train/anchor_norm_ratio"] = self._norm_ratio(anchor, self.reference)
        return metrics

    def _norm_ratio(self, predictions: Tensor, reference: Tensor) -> Tensor:
        """|prediction| / |reference's|, mean (B,) over the images of a pair."""
        norm, below = (rows.flatten(1).norm(dim=1) for rows in (predictions, reference))
        return self.of_pair(norm / below.clamp_min(torch.finfo(below.dtype).tiny))


def anchor_of(settings: ForwardConfig, empty: Conditioning | None) -> Anchor | None:
    """The anchor that a method's settings name.

    Raises:
        ConfigError: it is guided, and there is no conditioning of the empty prompt.
    """
    named = settings.anchor
    if named is None:
        return None
    if named.guidance > 1 and empty is None:
        raise ConfigError(
            f"algorithm.anchor_guidance is {named.guidance:g}, but no conditioning of the empty prompt was "
            "given; pass `empty`, or set it to 1"
        )
    return Anchor(*named, empty)


def held_rows(keys: Sequence[str], noise_key: NoiseKey, draws: int, held: int) -> Tensor | None:
    """Rows of a half at which an anchor holds the policy: of each pair's K draws M neighbours, from one on
    that is drawn by the pair's key (after the last draw comes the first), so that each draw, and with it each
    part of the times, has the same chance.

    Returns:
        (M B,) indices into K B rows; None where every draw is held.
    """
    if held >= draws:
        return None
    first = torch.tensor([int(draws * keyed_uniform(*noise_key, key, "held")) for key in keys])
    chosen = (first + torch.arange(held)[:, None]) % draws
    return (chosen * len(keys) + torch.arange(len(keys))).flatten()


def predict_pairs(policy: Policy, pairs: NoisyPairs, *, needs_reference: bool = True) -> PairPredictions:
    """Predictions under "current" with gradient and "reference" without, in one forward each."""
    images = pairs.both(policy)
    current = images.predict_under(policy, "current")
    reference = images.predict_under(policy, "reference") if needs_reference else None
    return PairPredictions(pairs, images, current, reference)


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
    pairs = NoisyPairs(winner, loser, draw, conditioning)
    return predict_pairs(policy, pairs, needs_reference=needs_reference).errors()


def in_parts(
    policy: Policy, pairs: NoisyPairs, errors: PairErrors, objective: Callable[[PairErrors], LossOutput]
) -> Iterator[LossOutput]:
    """An objective of pair errors as two losses, whose values and gradients add up to its own.

    Args:
        policy: Runs "current" once with gradient for each half.
        pairs: Those that the errors were measured on.
        errors: Of policy and reference, measured without gradient.
        objective: Errors to a scalar loss and its metrics.
    Returns:
        Two losses in turn: the first has the objective's value and the winners' gradient, the second value 0
        and the losers'. The graph of the second is built when it is asked for.
    """
    measured = {
        "winner": errors.winner,
        "loser": errors.loser,
        "distance": errors.distance,
        "from_reference": errors.from_reference,
    }
    leaves: dict[str, Any] = {
        name: error.detach().requires_grad_() for name, error in measured.items() if error is not None
    }
    whole = objective(replace(errors, **leaves))
    found = torch.autograd.grad(whole.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    slopes = dict(zip(leaves, found, strict=True))
    shown, metrics = whole.loss.detach(), whole.metrics
    for number, (name, half) in enumerate((("winner", pairs.winner), ("loser", pairs.loser))):
        images = pairs.half(policy, half)
        prediction = images.predict_under(policy, "current")
        terms = [(slopes[name], pairs.mean(images.error(prediction)))]
        held = pairs.held_of_half(prediction)
        for pull, target, rows in (
            ("distance", errors.anchor, held),
            ("from_reference", errors.reference, prediction),
        ):
            if target is not None:
                distance = squared_distance(rows, target.chunk(2)[number])
                terms.append((0.5 * slopes[pull], pairs.mean(distance)))
        loss = shown + sum((slope * (error - error.detach())).sum() for slope, error in terms)
        yield LossOutput(loss, metrics)
        shown, metrics = torch.zeros_like(shown), {}


def common_part(errors: PairErrors) -> Metrics:
    """How far both errors of the policy have risen together, which the margin does not see.

    mean((e_w - r_w) + (e_l - r_l)) / mean(r_w + r_l)

    Returns:
        The metric `train/common_part` as two sums: 0 where policy = reference, 1 where the errors have
        doubled. Empty without a reference.
    """
    if errors.winner_ref is None or errors.loser_ref is None:
        return {}
    reference = errors.winner_ref + errors.loser_ref
    rise = errors.winner.detach() + errors.loser.detach() - reference
    return {"train/common_part": (rise.sum(), reference.sum())}


def error_metrics(errors: PairErrors, margin: Tensor, beta: Tensor | float) -> dict[str, Tensor]:
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
    return values
