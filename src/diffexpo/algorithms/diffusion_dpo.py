"""Diffusion-DPO: learn from pairs that the winner's denoising error should fall more than the loser's.

h = -beta/2 [(e_w - e_w_ref) - (e_l - e_l_ref)],   loss = -log sigmoid(h)

with e the mean squared prediction error at one shared (t, eps). Source: arXiv 2311.12908; conventions of the
authors' code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import NoiseKey, RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, PairPredictions, error_metrics, predict_pairs
from diffexpo.algorithms.safeguards import auto_beta, safeguard_scale, safeguarded_loser
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import PairBatch, Policy

Kind = Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LINEAR_END = 1.25
"""Logit beyond which the loss `linear` has no slope, and below whose negative it has the full one."""


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
    linear   f(z) with f'(z) = -clamp(1/2 - 0.4 z, 0, 1):   -z below -1.25, 0 above 1.25,
             0.2 (z - 1.25)^2 between

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy.
        winner_ref, loser_ref: (B,) those of the reference at the same noise and time (no gradient).
        beta: > 0. The papers' 5000 at 16,384 latent elements pulls like 156 at 512.
        kind: Loss on the logit.
        label_smoothing: q, assumed share of flipped labels in [0, 0.5); only cdpo and robust use it.
        offset: number or (B,), demanded margin; Gamma_w - Gamma_l is optimism about uncertainty, its negative
            pessimism.
    Returns:
        (B,). With policy = reference, sigmoid gives ln 2 = 0.6931472 and linear f(0) = 0.3125.
    Raises:
        ValueError: beta, kind or label_smoothing out of range.
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14; SLiC (2305.10425) hinge, IPO (2310.12036) eq. 17
        multiplied by (beta/2)^2 so that its gradient is of usable size, conservative DPO (Mitchell 2023),
        robust DPO (2403.00409) eq. 12. Linear-DPO (2605.21123): its gradient, the error difference times
        clamp(1/2 + 0.2 beta d, 0, 1) with d = -2 h / beta, is given as that of a function of the logit, and
        so has the factor beta/2 of all margins here, which the authors' loss has not.
    """
    check_above_zero("diffusion_dpo_loss", beta=beta)
    if kind not in KINDS:
        raise ValueError(
            f"diffusion_dpo_loss: kind is {kind!r}; expected sigmoid, hinge, ipo, cdpo, robust or linear "
            "(simpo has its own function)"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"diffusion_dpo_loss: label_smoothing is {label_smoothing}; expected 0 <= q < 0.5")
    if label_smoothing and kind not in ("cdpo", "robust"):
        raise ValueError(
            f"diffusion_dpo_loss: label_smoothing is {label_smoothing}, but kind {kind!r} ignores it; take "
            "cdpo or robust"
        )
    margin = pair_margin(winner, loser, winner_ref, loser_ref, beta=beta)
    return _loss_of_logit(margin - offset, kind, label_smoothing)


def _loss_of_logit(z: Tensor, kind: Kind, label_smoothing: float) -> Tensor:
    if kind == "sigmoid":
        return -logsigmoid(z)
    if kind == "hinge":
        return torch.relu(1 - z)
    if kind == "ipo":
        return (z - 0.5).square()
    if kind == "linear":
        held = z.clamp(-LINEAR_END, LINEAR_END)
        return 0.2 * (held - LINEAR_END).square() + torch.relu(-LINEAR_END - z)
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
    check_above_zero("simpo_loss", beta=beta)
    return -logsigmoid(0.5 * beta * (at_least_float32(loser) - at_least_float32(winner)) - gamma)


class DiffusionDpo(PairMethod):
    """Diffusion-DPO and its variants on a `PairBatch`."""

    settings: DiffusionDpoConfig

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """Loss (B,) of each pair with the anchor on winners, and the metrics of the errors."""
        settings, scale = self.settings, errors.loser_scale
        loser = errors.loser if scale is None else safeguarded_loser(errors.loser, scale)
        offset = self._offset(batch, errors.winner)
        if settings.kind == "simpo":
            beta = settings.beta
            per_pair = simpo_loss(errors.winner, loser, beta=beta, gamma=settings.simpo_gamma + offset)
            margin = 0.5 * beta * (errors.loser - errors.winner)
        else:
            beta = self.beta_of(errors, batch)
            margin = pair_margin(*replace(errors, loser=loser).four, beta=beta)
            per_pair = _loss_of_logit(margin - offset, settings.kind, settings.label_smoothing)
        if settings.sft_weight > 0:
            per_pair = per_pair + settings.sft_weight * errors.winner
        metrics = error_metrics(errors, margin, beta)
        if scale is not None:
            metrics["train/loser_gradient_scale"] = scale
        if settings.auto_beta:
            metrics["train/beta"] = margin.new_tensor([beta])
        return per_pair, metrics

    def errors_of(self, seen: PairPredictions) -> PairErrors:
        """The four errors and, with the safeguard, the scale that follows from all draws of a pair."""
        errors = super().errors_of(seen)
        if not self.settings.safeguard:
            return errors
        difference = seen.current.detach() - seen.images.target
        winner, loser = (seen.pairs.by_pair(half) for half in difference.chunk(2))
        return replace(errors, loser_scale=safeguard_scale(winner, loser, mu=self.settings.safeguard_mu))

    def measure(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> Tensor:
        """(sum of |h| at beta 1, number of pairs), for the automatic beta."""
        with torch.no_grad():
            errors = predict_pairs(policy, self.noised(policy, batch, noise_key)).errors()
            margin = pair_margin(*errors.four, beta=1.0).to(torch.float64)
        return torch.stack([margin.abs().sum(), margin.new_tensor(len(margin))])

    def with_measured(self, batch: PairBatch, sums: Tensor) -> PairBatch:
        """The batch with the beta that suits the mean of |h| over all its pairs."""
        mean = sums[:1] / sums[1]
        # A margin that is not finite makes the step so too, whatever beta is.
        beta = self._suited_beta(mean) if bool(torch.isfinite(mean).all()) else self.settings.beta
        return replace(batch, measured=beta)

    def beta_of(self, errors: PairErrors, batch: PairBatch) -> float:
        """beta, or with the automatic one what suits the whole batch."""
        if not self.settings.auto_beta:
            return self.settings.beta
        if batch.measured is not None:
            return batch.measured
        return self._suited_beta(pair_margin(*errors.four, beta=1.0))

    def _suited_beta(self, margins_per_beta: Tensor) -> float:
        settings = self.settings
        return float(auto_beta(margins_per_beta, target=settings.auto_beta_target, maximum=settings.beta))

    def _offset(self, batch: PairBatch, like: Tensor) -> Tensor | float:
        """Gamma_w - Gamma_l times the scale; a batch without uncertainties (offline pairs) has none."""
        settings, winner, loser = self.settings, batch.uncertainty_winner, batch.uncertainty_loser
        if settings.uncertainty == "off" or winner is None or loser is None:
            return 0.0
        sign = 1.0 if settings.uncertainty == "optimism" else -1.0
        return sign * settings.uncertainty_scale * (winner.to(like) - loser.to(like))
