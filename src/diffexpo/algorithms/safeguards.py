"""Guards around pair losses: a step that spares the winner, a beta that keeps the sigmoid unsaturated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.diffusion.kernels import at_least_float32


def safeguard_scale(winner_gradient: Tensor, loser_gradient: Tensor, *, mu: float) -> Tensor:
    """Largest scale of the loser's gradient at which a step does not raise the winner's error.

    scale = min(1, (1 - mu) |g_w|^2 / <g_w, g_l>)   where <g_w, g_l> > 0, else 1

    so that, to first order, the step obeys <-g_w + scale g_l, g_w> <= -mu |g_w|^2.

    Args:
        winner_gradient: (B, ...) gradient of the winner's error by the network's output, prediction - target
            up to a factor.
        loser_gradient: (B, ...) that of the loser's error, with the same factor.
        mu: In [0, 1]; share of the winner's own descent that must remain. 1 stops the loser wherever it
            conflicts.
    Returns:
        (B,) in [0, 1] without gradient. Equal gradients give 1 - mu; orthogonal or opposed ones 1.
    Raises:
        ValueError: the shapes differ, or mu is out of range.
    Source: Diffusion-SDPO (arXiv 2511.03317), output-space form, authors' code (mu 0.9 for SD1.5, 0.6 for
        SDXL). There one scale serves the whole batch and 1e-9 is added to the product; here each pair has its
        own, which holds the inequality for every pair, and nothing is added, so a common factor cancels. The
        output stands in for the parameters: what two images share of the network is not looked at.
    """
    if winner_gradient.shape != loser_gradient.shape:
        raise ValueError(
            f"safeguard_scale: winner_gradient has shape {tuple(winner_gradient.shape)} and loser_gradient "
            f"{tuple(loser_gradient.shape)}; they must be equal"
        )
    if not 0 <= mu <= 1:
        raise ValueError(f"safeguard_scale: mu is {mu}; expected 0 <= mu <= 1")
    winner, loser = (
        at_least_float32(gradient).detach().flatten(1) for gradient in (winner_gradient, loser_gradient)
    )
    conflict = (winner * loser).sum(dim=1)
    cap = (1 - mu) * winner.square().sum(dim=1) / torch.where(conflict > 0, conflict, 1.0)
    return torch.where(conflict > 0, cap.clamp(max=1), 1.0)


def safeguarded_loser(loser: Tensor, scale: Tensor) -> Tensor:
    """The loser's error with its gradient multiplied by the scale, to stand for it in any pair loss.

    stop(loser) + scale (loser - stop(loser))

    Args:
        loser: (B,) mean squared prediction errors of the policy.
        scale: (B,) in [0, 1], from `safeguard_scale`; no gradient reaches it.
    Returns:
        (B,), equal to `loser` bit for bit. Scale 1 leaves the gradient as it is, 0 removes it.
    Source: Diffusion-SDPO (arXiv 2511.03317), authors' code.
    """
    loser = at_least_float32(loser)
    return loser.detach() + scale.detach() * (loser - loser.detach())


def auto_beta(margins_per_beta: Tensor, *, target: float = 0.2, maximum: float = 5000.0) -> Tensor:
    """Beta at which a pair of average margin has the wanted gradient factor sigmoid(-h).

    beta = min(maximum, log((1 - target) / target) / mean |m|),   so that sigmoid(-beta mean |m|) = target

    Args:
        margins_per_beta: m = h / beta, that is `pair_margin(..., beta=1)`; any shape, of a batch, or the
            running mean of |m| alone.
        target: Gradient factor in (0, 1/2).
        maximum: > 0; returned while policy = reference, where every margin is 0.
    Returns:
        Scalar without gradient. Margins +-1 and target 0.2 give ln 4 = 1.3862944.
    Raises:
        ValueError: margins are empty or not finite, target or maximum out of range.
    Source: SimpleTuner's idea for Flow-DPO (there with a running mean). The mean factor of the batch, mean
        sigmoid(-beta |m|), equals the target if all |m| are equal and lies above it otherwise (Jensen), so
        margins are never saturated further than asked. Negative margins count by their size: they have
        factors above 1/2 under any beta.
    """
    if not 0 < target < 0.5:
        raise ValueError(f"auto_beta: target is {target}; expected 0 < target < 0.5")
    check_above_zero("auto_beta", maximum=maximum)
    margins = at_least_float32(margins_per_beta).detach()
    if margins.numel() == 0 or not bool(torch.isfinite(margins).all()):
        raise ValueError(
            f"auto_beta: {margins.numel()} margins, of which {int((~torch.isfinite(margins)).sum())} are not "
            "finite; expected one or more, all finite"
        )
    return (math.log((1 - target) / target) / margins.abs().mean()).clamp(max=maximum)
