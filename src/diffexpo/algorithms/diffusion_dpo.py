"""Diffusion-DPO: learn from pairs that the winner's denoising error should fall more than the loser's.

h = -beta/2 [(e_w - e_w_ref) - (e_l - e_l_ref)],   loss = -log sigmoid(h)

with e the mean squared prediction error at one shared (t, eps). Source: arXiv 2311.12908; conventions of the
authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.config.schema import AlgorithmConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoiseDraw, empty_prompt_mask, pair_errors
from diffexpo.errors import ConfigError
from diffexpo.types import Conditioning, LossOutput, PairBatch, Policy

Kind = Literal["sigmoid", "hinge", "ipo", "cdpo", "robust"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Metrics = dict[str, tuple[Tensor, int]]


def pair_margin(
    winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, *, beta: float
) -> Tensor:
    """Difference of implicit rewards, h = -beta/2 [(winner - winner_ref) - (loser - loser_ref)].

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy.
        winner_ref, loser_ref: (B,) those of the reference at the same noise and time; no gradient reaches
            them.
        beta: > 0; multiplies a mean error, so the pull grows with the number of latent elements.
    Returns:
        (B,), positive where the policy has moved towards the winner. Policy = reference gives 0.
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14 with T and the weighting merged into beta, as in the
        authors' code.
    """
    winner, loser, winner_ref, loser_ref = map(at_least_float32, (winner, loser, winner_ref, loser_ref))
    return -0.5 * beta * ((winner - winner_ref.detach()) - (loser - loser_ref.detach()))


def diffusion_dpo_loss(
    winner: Tensor,
    loser: Tensor,
    winner_ref: Tensor,
    loser_ref: Tensor,
    *,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    offset: Tensor | float = 0.0,
) -> Tensor:
    """Diffusion-DPO loss of each pair, on the logit z = h - offset with h = `pair_margin`.

    sigmoid  -logsigmoid(z)                                        hinge  max(0, 1 - z)
    cdpo     -(1-q) logsigmoid(z) - q logsigmoid(-z)               ipo    (z - 1/2)^2
    robust   [-(1-q) logsigmoid(z) + q logsigmoid(-z)] / (1 - 2q)

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy.
        winner_ref, loser_ref: (B,) those of the reference at the same noise and time (no gradient).
        beta: > 0. The papers' 5000 at 16,384 latent elements pulls like 156 at 512.
        kind: Loss on the logit.
        label_smoothing: q, assumed share of flipped labels in [0, 0.5); only cdpo and robust use it.
        offset: number or (B,), demanded margin; Gamma_w - Gamma_l is optimism about uncertainty, its negative
            pessimism.
    Returns:
        (B,). With policy = reference, sigmoid gives ln 2 = 0.6931472.
    Raises:
        ValueError: beta, kind or label_smoothing out of range.
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14; SLiC (2305.10425) hinge, IPO (2310.12036) eq. 17
        multiplied by (beta/2)^2 so that its gradient is of usable size, conservative DPO (Mitchell 2023),
        robust DPO (2403.00409) eq. 12.
    """
    if not beta > 0:
        raise ValueError(f"diffusion_dpo_loss: beta is {beta}; expected a number above 0")
    if kind not in KINDS:
        raise ValueError(
            f"diffusion_dpo_loss: kind is {kind!r}; expected sigmoid, hinge, ipo, cdpo or robust "
            "(simpo has its own function)"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"diffusion_dpo_loss: label_smoothing is {label_smoothing}; expected 0 <= q < 0.5")
    if label_smoothing and kind not in ("cdpo", "robust"):
        raise ValueError(
            f"diffusion_dpo_loss: label_smoothing is {label_smoothing}, but kind {kind!r} ignores it; "
            "take cdpo or robust"
        )
    z = pair_margin(winner, loser, winner_ref, loser_ref, beta=beta) - offset
    if kind == "sigmoid":
        return -logsigmoid(z)
    if kind == "hinge":
        return torch.relu(1 - z)
    if kind == "ipo":
        return (z - 0.5).square()
    agree, flipped = -(1 - label_smoothing) * logsigmoid(z), label_smoothing * logsigmoid(-z)
    if kind == "cdpo":
        return agree - flipped
    return (agree + flipped) / (1 - 2 * label_smoothing)


def simpo_loss(winner: Tensor, loser: Tensor, *, beta: float, gamma: Tensor | float) -> Tensor:
    """Reference-free preference loss, -logsigmoid(beta/2 (loser - winner) - gamma).

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy.
        beta: > 0.
        gamma: Demanded margin of the logit, >= 0; number or (B,).
    Returns:
        (B,). Equal errors and gamma 0 give ln 2. Without a reference the model drifts: use a small learning
        rate.
    Raises:
        ValueError: beta is not above 0.
    Source: SimPO (arXiv 2405.14734) eq. 6, with the log-likelihood replaced by -error as in Diffusion-DPO.
    """
    if not beta > 0:
        raise ValueError(f"simpo_loss: beta is {beta}; expected a number above 0")
    return -logsigmoid(0.5 * beta * (at_least_float32(loser) - at_least_float32(winner)) - gamma)


@dataclass(frozen=True)
class PairErrors:
    """Errors (B,) of policy and, where the loss needs them, reference on winners and losers."""

    winner: Tensor
    loser: Tensor
    winner_ref: Tensor | None
    loser_ref: Tensor | None


class DiffusionDpo:
    """Diffusion-DPO and its variants on a `PairBatch`."""

    batch_type = PairBatch

    def __init__(self, settings: AlgorithmConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        if settings.empty_prompt_fraction > 0 and empty is None:
            raise ConfigError(
                f"algorithm.empty_prompt_fraction is {settings.empty_prompt_fraction}, but no "
                "conditioning of the empty prompt was given; pass `empty`, or set the fraction to 0"
            )
        if settings.label_smoothing > 0 and settings.kind not in ("cdpo", "robust"):
            raise ConfigError(
                f"algorithm.label_smoothing is {settings.label_smoothing}, but kind {settings.kind!r} ignores "
                "it; expected kind cdpo or robust, or label_smoothing 0"
            )
        self.settings = settings
        self.empty = empty

    @property
    def needs_reference(self) -> bool:
        return self.settings.kind != "simpo"

    def loss(self, policy: Policy, batch: PairBatch, noise_key: tuple[str | int, ...]) -> LossOutput:
        """Mean loss over the batch's pairs and its metrics; noise is keyed by (noise_key, pair key)."""
        per_pair, metrics = self.pair_losses(policy, batch, noise_key)
        loss = per_pair.mean()
        metrics["train/loss"] = (loss.detach() * len(batch), len(batch))
        return LossOutput(loss, metrics)

    def pair_losses(
        self, policy: Policy, batch: PairBatch, noise_key: tuple[str | int, ...]
    ) -> tuple[Tensor, Metrics]:
        """Weighted loss (B,) of each pair, with the anchor on winners, and the metrics of the errors."""
        settings = self.settings
        draw = NoiseDraw.keyed(batch.keys, noise_key, policy.path, batch.winner.shape[1:])
        conditioning = self._with_empty_prompts(batch, noise_key)
        errors = measure_errors(
            policy, batch.winner, batch.loser, draw, conditioning, needs_reference=self.needs_reference
        )
        offset = self._offset(batch, errors.winner)
        if settings.kind == "simpo":
            per_pair = simpo_loss(
                errors.winner, errors.loser, beta=settings.beta, gamma=settings.simpo_gamma + offset
            )
            margin = 0.5 * settings.beta * (errors.loser - errors.winner)
        else:
            four = (errors.winner, errors.loser, errors.winner_ref, errors.loser_ref)
            per_pair = diffusion_dpo_loss(
                *four,
                beta=settings.beta,
                kind=settings.kind,
                label_smoothing=settings.label_smoothing,
                offset=offset,
            )
            margin = pair_margin(*four, beta=settings.beta)
        if settings.sft_weight > 0:
            per_pair = per_pair + settings.sft_weight * errors.winner
        if batch.weight is not None:
            per_pair = per_pair * batch.weight.to(per_pair)
        return per_pair, _error_metrics(errors, margin, settings.beta)

    def _with_empty_prompts(self, batch: PairBatch, noise_key: tuple[str | int, ...]) -> Conditioning:
        """The batch's conditioning with a keyed share of its rows replaced by the empty prompt."""
        fraction = self.settings.empty_prompt_fraction
        if fraction == 0 or self.empty is None:
            return batch.conditioning
        mask = empty_prompt_mask(batch.keys, noise_key, fraction)
        if not bool(mask.any()):
            return batch.conditioning
        tensors = {}
        for name, rows in batch.conditioning.tensors.items():
            empty = self.empty.tensors[name].to(rows.device, rows.dtype)
            chosen = mask.to(rows.device).reshape(-1, *[1] * (rows.ndim - 1))
            tensors[name] = torch.where(chosen, empty, rows)
        return Conditioning(tensors)

    def _offset(self, batch: PairBatch, like: Tensor) -> Tensor | float:
        """Gamma_w - Gamma_l times the scale; a batch without uncertainties (offline pairs) has none."""
        settings = self.settings
        if (
            settings.uncertainty == "off"
            or batch.uncertainty_winner is None
            or batch.uncertainty_loser is None
        ):
            return 0.0
        sign = 1.0 if settings.uncertainty == "optimism" else -1.0
        gap = batch.uncertainty_winner.to(like) - batch.uncertainty_loser.to(like)
        return sign * settings.uncertainty_scale * gap


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
    with torch.no_grad(), policy.weights.use("reference"):
        reference = pair_errors(policy, winner, loser, draw.eps, draw.t, conditioning)
    return PairErrors(*current, *reference)


def _error_metrics(errors: PairErrors, margin: Tensor, beta: float) -> Metrics:
    margin = margin.detach()
    winner, loser = errors.winner.detach(), errors.loser.detach()
    values = {
        "train/implicit_accuracy": (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin),
        "train/margin": margin,
        "train/winner_error": winner,
        "train/loser_error": loser,
    }
    if errors.winner_ref is not None and errors.loser_ref is not None:
        values["train/winner_reference_error"] = errors.winner_ref
        values["train/loser_reference_error"] = errors.loser_ref
        values["train/implicit_reward_winner"] = -0.5 * beta * (winner - errors.winner_ref)
        values["train/implicit_reward_loser"] = -0.5 * beta * (loser - errors.loser_ref)
    return {name: (value.sum(), len(value)) for name, value in values.items()}
