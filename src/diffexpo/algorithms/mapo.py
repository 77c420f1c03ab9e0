"""MaPO: fit the winner and widen its margin over the loser, without a reference model. Source: arXiv
2406.06424; conventions of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, error_metrics
from diffexpo.config.methods.mapo import MapoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import PairBatch

# x / (exp(x) - 1) - 1 = x (c_0 + x (c_1 + ...)): Bernoulli numbers over factorials. Below 1/2 the rest is
# under 1e-12, and closed form and derivative cancel digits there.
SERIES = (-1 / 2, 1 / 12, 0.0, -1 / 720, 0.0, 1 / 30240, 0.0, -1 / 1209600, 0.0, 1 / 47900160)
SERIES_BELOW = 0.5


def mapo_loss(
    winner: Tensor, loser: Tensor, *, beta: float, shift: float = 0.5, num_train_timesteps: int = 1000
) -> Tensor:
    """MaPO loss of each pair, winner - beta logsigmoid(T [phi(winner) - phi(loser)]), phi = `mapo_score`.

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy at one shared noise and time.
        beta: > 0, weight of the margin term against the winner's error.
        shift: s > 0, the scale of phi.
        num_train_timesteps: T >= 1, multiplies the margin.
    Returns:
        (B,). Equal errors e give e + beta ln 2. For small errors the margin is T s / 2 (loser - winner), that
        is 250 (loser - winner) by default, where Diffusion-DPO with beta 5000 has 2500.
    Raises:
        ValueError: beta, shift or num_train_timesteps out of range.
    Source: MaPO (arXiv 2406.06424), authors' code. phi is computed without cancellation and without overflow,
        and phi(0) is 1: in float32, exp(x) - 1 is wrong by 1 in the logit at errors of 1e-4.
    """
    if not (beta > 0 and num_train_timesteps >= 1):
        raise ValueError(
            f"mapo_loss: beta is {beta} and num_train_timesteps {num_train_timesteps}; expected beta above 0 "
            "and 1 timestep or more"
        )
    margin = mapo_margin(winner, loser, shift=shift, num_train_timesteps=num_train_timesteps)
    return at_least_float32(winner) - beta * logsigmoid(margin)


def mapo_margin(
    winner: Tensor, loser: Tensor, *, shift: float = 0.5, num_train_timesteps: int = 1000
) -> Tensor:
    """Margin of the winner's score over the loser's, z = T [phi(winner) - phi(loser)].

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy.
        shift: s > 0, the scale of phi.
        num_train_timesteps: T, multiplies the difference.
    Returns:
        (B,), positive where the winner's error is the smaller. Equal errors give 0.
    Raises:
        ValueError: shift is not above 0.
    Source: MaPO (arXiv 2406.06424), authors' code.
    """
    # Of phi - 1, because at small errors phi itself is 1 in every digit of float32.
    return num_train_timesteps * (_score_minus_1(winner, shift) - _score_minus_1(loser, shift))


def mapo_score(error: Tensor, *, shift: float = 0.5) -> Tensor:
    """Score of a sample under MaPO, phi(e) = s e / (exp(s e) - 1).

    Args:
        error: (B,) mean squared prediction errors, >= 0.
        shift: s > 0.
    Returns:
        (B,) in (0, 1], falling with the error; 1 - s e / 2 for small errors. Error 0 gives 1.
    Raises:
        ValueError: shift is not above 0.
    Source: MaPO (arXiv 2406.06424), authors' code, which logs it as the win and lose score.
    """
    return 1 + _score_minus_1(error, shift)


def _score_minus_1(error: Tensor, shift: float) -> Tensor:
    check_above_zero("mapo", shift=shift)
    x = shift * at_least_float32(error)
    is_small = x.abs() < SERIES_BELOW
    # Each branch sees only numbers it is good for: a gradient of 0 times infinity would be NaN.
    small = torch.where(is_small, x, torch.zeros_like(x))
    large = torch.where(is_small, torch.ones_like(x), x)
    series = torch.zeros_like(x)
    for coefficient in reversed(SERIES):
        series = small * (coefficient + series)
    closed = large * torch.exp(-large) / -torch.expm1(-large) - 1
    return torch.where(is_small, series, closed)


class Mapo(PairMethod):
    """MaPO on a `PairBatch`."""

    settings: MapoConfig

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """MaPO loss of each pair and the metrics of the errors."""
        beta, shift, steps = self.settings.beta, self.settings.shift, self.settings.num_train_timesteps
        both = (errors.winner, errors.loser)
        loss = mapo_loss(*both, beta=beta, shift=shift, num_train_timesteps=steps)
        margin = mapo_margin(*both, shift=shift, num_train_timesteps=steps)
        return loss, error_metrics(errors, margin, beta)
