"""Diffusion-KTO: learn from single images marked desirable or not, without pairs.

g = error_ref - error,   a = +-beta (g - z),   loss = w (1 - U(a))

with + for desirable images, z a baseline and U the utility that a person is taken to have. Source: arXiv
2404.04465; conventions of the authors' code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero, check_known
from diffexpo.algorithms.forward import NoiseKey, RowLosses, share_above_zero
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.config.methods.diffusion_kto import DiffusionKtoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import Policy, ScoredBatch

Utility = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"]
BaselineKind = Literal["mean", "class_mean"]
UTILITIES: tuple[Utility, ...] = get_args(Utility)
# exp(20) is 5e8; one sample beyond that would drown the batch and soon overflow float32.
LARGEST_EXPONENT = 20.0


def diffusion_kto_loss(
    error: Tensor,
    error_ref: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    baseline: Tensor | float,
    utility: Utility = "sigmoid",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Diffusion-KTO loss of each image, w (1 - U), with y = +1 for desirable images and -1 for the others.

    u = beta (error_ref - error - baseline),   a = y u
    sigmoid         U = sigmoid(a)                loss_averse     U = logsigmoid(a)
    risk_seeking_1  U = -y logsigmoid(-u)         risk_seeking_2  U = y exp(u / 100) - 1
    risk_seeking_3  U = -logsigmoid(-a)

    Args:
        error: (B,) mean squared prediction errors of the policy.
        error_ref: (B,) those of the reference at the same noise and time; no gradient reaches them.
        desirable: (B,) bool.
        beta: > 0. There is no 1/2 here: 1000 pulls like Diffusion-DPO's 2000.
        baseline: Scalar z, in units of error_ref - error; no gradient reaches it. See `kto_baseline`.
        utility: Shape of U.
        desirable_weight, undesirable_weight: >= 0, w of the two classes.
    Returns:
        (B,). Policy = reference and baseline 0 give w / 2 for sigmoid. The other utilities are unbounded, so
        their losses may be negative; only gradients matter. The exponent of risk_seeking_2 is held at 20,
        where the gradient ends.
    Raises:
        ValueError: beta, utility, a weight or the type of desirable is out of range.
    Source: Diffusion-KTO (arXiv 2404.04465), utilities and signs as in the authors' code.
    """
    _check_labels("diffusion_kto_loss", desirable)
    check_above_zero("diffusion_kto_loss", beta=beta)
    check_known("diffusion_kto_loss", UTILITIES, utility=utility)
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(
            f"diffusion_kto_loss: desirable_weight is {desirable_weight} and undesirable_weight "
            f"{undesirable_weight}; expected 0 or more"
        )
    gain = at_least_float32(error_ref).detach() - at_least_float32(error)
    u = beta * (gain - (baseline.detach() if isinstance(baseline, Tensor) else baseline))
    y = torch.where(desirable, u.new_tensor(1.0), u.new_tensor(-1.0))
    weight = torch.where(desirable, u.new_tensor(desirable_weight), u.new_tensor(undesirable_weight))
    return weight * (1 - _utility(u, y, utility))


def kto_baseline(
    error: Tensor, error_ref: Tensor, desirable: Tensor, *, kind: BaselineKind = "mean"
) -> Tensor:
    """Baseline z of `diffusion_kto_loss`, an estimate of how far the policy has moved from the reference.

    mean        max(0, mean g)                      g = error_ref - error
    class_mean  mean of (mean g over desirable images, mean g over the others), not clamped

    Args:
        error, error_ref: (B,) mean squared prediction errors of policy and reference. Give as many samples as
            there are (all processes, all micro-batches): the mean of two is mostly noise.
        desirable: (B,) bool; only class_mean uses it.
        kind: Which estimate.
    Returns:
        Scalar without gradient, in units of the errors, before beta. Policy = reference gives 0.
    Raises:
        ValueError: kind is unknown, desirable is not bool, or there is no sample.
    Source: Diffusion-KTO (arXiv 2404.04465), authors' code: its "none" is our mean, its "sigmoid" our
        class_mean. There a class without samples counts as 0; here the other class alone is the mean.
    """
    _check_labels("kto_baseline", desirable)
    check_known("kto_baseline", get_args(BaselineKind), kind=kind)
    if error.numel() == 0:
        raise ValueError("kto_baseline: there are 0 errors; expected one or more")
    gain = (at_least_float32(error_ref) - at_least_float32(error)).detach()
    if kind == "mean":
        return gain.mean().clamp(min=0)
    means = [gain[chosen].mean() for chosen in (desirable, ~desirable) if bool(chosen.any())]
    return torch.stack(means).mean()


def _utility(u: Tensor, y: Tensor, utility: Utility) -> Tensor:
    if utility == "sigmoid":
        return torch.sigmoid(y * u)
    if utility == "loss_averse":
        return logsigmoid(y * u)
    if utility == "risk_seeking_1":
        return -y * logsigmoid(-u)
    if utility == "risk_seeking_2":
        return y * torch.exp((u / 100).clamp(max=LARGEST_EXPONENT)) - 1
    return -logsigmoid(-y * u)


def _check_labels(function: str, desirable: Tensor) -> None:
    # The complement of an integer label 1 is -2, which is true as well.
    if desirable.dtype != torch.bool:
        raise ValueError(f"{function}: desirable has dtype {desirable.dtype}; expected torch.bool")


class DiffusionKto(ScoredMethod):
    """Diffusion-KTO on a `ScoredBatch`. The baseline is that of the step's whole batch, from a pass without
    gradient."""

    settings: DiffusionKtoConfig

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """Diffusion-KTO loss of each image."""
        settings, desirable = self.settings, batch.desirable
        error, error_ref = (images.error_under(policy, version) for version in ("current", "reference"))
        baseline: Tensor | float | None = batch.measured
        if baseline is None:
            baseline = kto_baseline(error, error_ref, desirable, kind=settings.baseline)
        loss = diffusion_kto_loss(
            error,
            error_ref,
            desirable,
            beta=settings.beta,
            baseline=baseline,
            utility=settings.utility,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        gain = (error_ref - error).detach()
        above = gain - baseline
        return loss, {
            "train/baseline": torch.zeros_like(gain) + settings.beta * baseline,
            "train/implicit_accuracy": share_above_zero(torch.where(desirable, above, -above)),
            "train/implicit_reward_desirable": (settings.beta * gain, desirable),
            "train/implicit_reward_undesirable": (settings.beta * gain, ~desirable),
        }

    def measure(self, policy: Policy, batch: ScoredBatch, noise_key: NoiseKey) -> Tensor:
        """Sum of g and number of images, of desirable ones and of the others."""
        images = self.noised(policy, batch, noise_key)
        with torch.no_grad():
            error, error_ref = (images.error_under(policy, version) for version in ("current", "reference"))
        gain, desirable = (error_ref - error).to(torch.float64), batch.desirable.to(torch.float64)
        other = 1 - desirable
        return torch.stack([(gain * desirable).sum(), desirable.sum(), (gain * other).sum(), other.sum()])

    def with_measured(self, batch: ScoredBatch, sums: Tensor) -> ScoredBatch:
        """The batch with the baseline of all its images, `kto_baseline` by other means."""
        total, count = sums[0::2], sums[1::2]
        if self.settings.baseline == "mean":
            baseline = (total.sum() / count.sum()).clamp(min=0)
        else:
            baseline = (total[count > 0] / count[count > 0]).mean()
        return replace(batch, measured=float(baseline))
