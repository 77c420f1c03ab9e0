"""SPIN-Diffusion (arXiv 2402.10210): real images win against the model's own, with the previous iterate as
reference.
"""

from __future__ import annotations

from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.diffusion_dpo import diffusion_dpo_loss, pair_margin
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, error_metrics
from diffexpo.config.methods.spin import SpinConfig
from diffexpo.types import PairBatch


def spin_loss(
    data: Tensor, generated: Tensor, data_ref: Tensor, generated_ref: Tensor, *, beta: float
) -> Tensor:
    """Self-play loss of each couple, the Diffusion-DPO loss with data as winner and own sample as loser.

    -logsigmoid(-beta/2 [(data - data_ref) - (generated - generated_ref)])

    Args:
        data: (B,) mean squared prediction errors of the policy on images of the data set.
        generated: (B,) those on images that the previous iterate drew for the same prompts.
        data_ref, generated_ref: (B,) those of the previous iterate at the same noise and time; no gradient
            reaches them.
        beta: > 0.
    Returns:
        (B,), `diffusion_dpo_loss` bit for bit. Policy = previous iterate gives ln 2 = 0.6931472.
    Raises:
        ValueError: beta is not above 0.
    Source: SPIN-Diffusion (arXiv 2402.10210), the approximate objective at one random time. The paper's
        beta_t has no 1/2, every margin here has, so the paper's number is doubled to mean the same.
    """
    check_above_zero("spin_loss", beta=beta)
    return diffusion_dpo_loss(data, generated, data_ref, generated_ref, beta=beta)


class Spin(PairMethod):
    """SPIN-Diffusion on a `PairBatch` of data images (winners) and the previous iterate's own (losers)."""

    settings: SpinConfig

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """Self-play loss of each couple and the metrics of the errors."""
        beta = self.settings.beta
        margin = pair_margin(*errors.four, beta=beta)
        return spin_loss(*errors.four, beta=beta), error_metrics(errors, margin, beta)
