"""ORPO: fit the winner and raise its odds over the loser's, without a reference model.

p = exp(-beta e),   odds(p) = p / (1 - p) = 1 / (exp(beta e) - 1)
z = log odds(p_w) - log odds(p_l),   loss = e_w - weight log sigmoid(z)

Source: arXiv 2403.07691, with a likelihood made of the denoising error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, error_metrics
from diffexpo.config.methods.orpo import OrpoConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.types import PairBatch


def orpo_loss(winner: Tensor, loser: Tensor, *, beta: float, weight: float) -> Tensor:
    """ORPO loss of each pair, winner - weight logsigmoid(z), z = `orpo_margin`.

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy at one shared noise and time.
        beta: > 0, scale of the error in p = exp(-beta e).
        weight: > 0, the paper's lambda.
    Returns:
        (B,). Equal errors e give e + weight ln 2; errors 0.1 and 0.2 with beta 1 and weight 0.1 give
        0.1388672. It falls with the winner's error and rises as the loser's falls.
    Raises:
        ValueError: beta or weight is not above 0.
    Source: ORPO (arXiv 2403.07691) eq. 6 and 7, divided by beta in the supervised term, -log p = beta e. The
        Diffusion-ORPO example of diffusers has log sigmoid(e_w - e_l) instead: as log p is -e, its sign is
        turned round, and minimising it lowers the loser's error too.
    """
    check_above_zero("orpo_loss", weight=weight)
    return at_least_float32(winner) - weight * logsigmoid(orpo_margin(winner, loser, beta=beta))


def orpo_margin(winner: Tensor, loser: Tensor, *, beta: float) -> Tensor:
    """Log odds ratio of each pair, z = log odds(p_w) - log odds(p_l).

    z = log[expm1(beta loser) / expm1(beta winner)]

    Args:
        winner, loser: (B,) mean squared prediction errors of the policy, >= 0. Below the squared rounding
            error of their type (1.4e-14 in float32) they count as that number.
        beta: > 0, scale of the error in p = exp(-beta e).
    Returns:
        (B,), positive where the winner's error is the smaller. Equal errors give 0; small ones
        log(loser / winner), large ones beta (loser - winner).
    Raises:
        ValueError: beta is not above 0.
    Source: ORPO (arXiv 2403.07691) eq. 4 and 5. expm1(x) is exp(x) (1 - exp(-x)), which does not overflow.
    """
    check_above_zero("orpo_margin", beta=beta)
    floor = torch.finfo(at_least_float32(winner).dtype).eps ** 2
    winner, loser = (at_least_float32(error).clamp_min(floor) for error in (winner, loser))
    return beta * (loser - winner) + torch.log(torch.expm1(-beta * loser) / torch.expm1(-beta * winner))


class Orpo(PairMethod):
    """ORPO on a `PairBatch`."""

    settings: OrpoConfig

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """ORPO loss of each pair and the metrics of the errors."""
        beta = self.settings.beta
        loss = orpo_loss(errors.winner, errors.loser, beta=beta, weight=self.settings.weight)
        margin = orpo_margin(errors.winner, errors.loser, beta=beta)
        return loss, error_metrics(errors, margin, beta)
