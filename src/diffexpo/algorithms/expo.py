"""EXPO: Diffusion-DPO on offline and online pairs, plus a bonus for exploring beyond the main agent.

loss = mean(-log sigmoid(h)) + alpha mean(sigmoid(-h_ex))
h_ex = -beta_ex/2 [delta(x) - delta(x')],   delta = error - error_ref

x is an exploration sample, x' a main sample of the same prompt at one shared (t, eps). The papers' s is this
error difference delta (read as a reward, both terms would reverse). Source: the EXPO papers, loss (3) and
(7); docs/algorithms/expo.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffexpo.algorithms.checks import check_above_zero
from diffexpo.algorithms.diffusion_dpo import DiffusionDpo, diffusion_dpo_loss, pair_margin
from diffexpo.algorithms.forward import Metrics, NoiseKey, as_metrics
from diffexpo.algorithms.pairs import NoisyPairs, PairErrors, in_parts, predict_pairs
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.errors import DataError
from diffexpo.types import Conditioning, LossOutput, PairBatch, Policy


def exploration_bonus(
    explored: Tensor, main: Tensor, explored_ref: Tensor, main_ref: Tensor, *, beta: float
) -> Tensor:
    """Predicted probability that the main sample beats the exploration sample; minimising it is optimism.

    sigmoid(beta/2 (delta_explored - delta_main)), delta = error - error_ref

    Args:
        explored, main: (E,) mean squared prediction errors of the policy on samples of the two agents, same
            prompt, noise, time.
        explored_ref, main_ref: (E,) those of the reference; no gradient reaches them.
        beta: > 0.
    Returns:
        (E,) in (0, 1). Policy = reference gives exactly 1/2. Descent lowers the exploration sample's error
        and raises the main sample's, with a slope of at most beta/8 each, so the bonus limits itself.
    Raises:
        ValueError: beta is not above 0.
    Source: EXPO eq. 3 (E sigma(beta (s_ex - s_main))) with s = delta; the 1/2 is that of our margins.
    """
    check_above_zero("exploration_bonus", beta=beta)
    return torch.sigmoid(-pair_margin(explored, main, explored_ref, main_ref, beta=beta))


# Many parameters because each is a term of the formula.
def expo_loss(
    winner: Tensor,
    loser: Tensor,
    winner_ref: Tensor,
    loser_ref: Tensor,
    explored: Tensor | None,
    main: Tensor | None,
    explored_ref: Tensor | None,
    main_ref: Tensor | None,
    *,
    beta: float,
    alpha: float,
    beta_explore: float | None = None,
) -> Tensor:
    """EXPO's loss, mean(diffusion_dpo_loss) + alpha mean(exploration_bonus).

    Args:
        winner, loser, winner_ref, loser_ref: (B,) mean squared prediction errors of the pairs.
        explored, main, explored_ref, main_ref: (E,) those of the contrast pairs; untouched, and may be None,
            when alpha is 0.
        beta: > 0, of the pairs.
        alpha: >= 0. Up to 1 (matched beta) the gradient on a labelled pair is never reversed, even if its
            loser is the exploration sample; beyond, its margin stalls at -log(alpha - 1).
        beta_explore: Of the bonus; None is `beta`.
    Returns:
        Scalar. Policy = reference gives ln 2 + alpha / 2. alpha 0 is diffusion_dpo_loss(...).mean() bit for
        bit.
    Raises:
        ValueError: alpha is negative, or above 0 without contrast errors.
    Source: EXPO eq. 3 and 7. One beta serves both terms by default; the papers print beta T in the first and
        beta in the second.
    """
    if not alpha >= 0:
        raise ValueError(f"expo_loss: alpha is {alpha}; expected 0 or more")
    loss = diffusion_dpo_loss(winner, loser, winner_ref, loser_ref, beta=beta).mean()
    if alpha == 0:
        return loss
    if explored is None or main is None or explored_ref is None or main_ref is None:
        raise ValueError(
            f"expo_loss: alpha is {alpha}, but a contrast error is None; pass all four, or alpha=0"
        )
    chosen = beta if beta_explore is None else beta_explore
    return loss + alpha * exploration_bonus(explored, main, explored_ref, main_ref, beta=chosen).mean()


class Expo:
    """EXPO on a `PairBatch` with contrast pairs: the preference term of Diffusion-DPO, and a bonus.

    Without a bonus (alpha 0, or no contrast pairs in the batch) it runs the very code of `DiffusionDpo`.
    """

    def __init__(self, settings: ExpoConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, needed if `empty_prompt_fraction` is above 0."""
        self.settings = settings
        self.preference = DiffusionDpo(settings, empty)
        self.measure, self.with_measured = self.preference.measure, self.preference.with_measured
        self.pair_losses, self.after_step = self.preference.pair_losses, self.preference.after_step
        self.margins = self.preference.margins

    def loss(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean loss over pairs plus alpha times the mean bonus over contrast pairs (none: no bonus)."""
        if not self._has_bonus(batch):
            return self.preference.loss(policy, batch, noise_key)
        per_pair, metrics = self.pair_losses(policy, batch, noise_key)
        bonus, bonus_metrics = self._bonus(
            predict_pairs(policy, self._contrast(policy, batch, noise_key)).errors()
        )
        loss = per_pair.mean() + self.settings.alpha * bonus.mean()
        metrics |= bonus_metrics
        metrics["train/loss"] = (loss.detach() * len(batch), len(batch))
        return LossOutput(loss, metrics)

    def loss_in_parts(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> Iterator[LossOutput]:
        """The loss of the pairs in two parts, then alpha times the bonus in two parts."""
        yield from self.preference.loss_in_parts(policy, batch, noise_key)
        if not self._has_bonus(batch):
            return
        contrast = self._contrast(policy, batch, noise_key)
        with torch.no_grad():
            errors = predict_pairs(policy, contrast).errors()

        def objective(errors: PairErrors) -> LossOutput:
            bonus, metrics = self._bonus(errors)
            return LossOutput(self.settings.alpha * bonus.mean(), metrics)

        yield from in_parts(policy, contrast, errors, objective)

    def _has_bonus(self, batch: PairBatch) -> bool:
        return self.settings.alpha > 0 and bool(batch.contrast_keys)

    def _contrast(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> NoisyPairs:
        """Explored and main latents with their noise and prompts."""
        if batch.explored is None or batch.main is None or batch.contrast_conditioning is None:
            raise DataError(
                f"the batch names {len(batch.contrast_keys)} contrast pairs but lacks explored, main or "
                "contrast_conditioning; expected all three"
            )
        # Its own name: the same pair may stand in the batch as a preference, with other noise.
        key = (*noise_key, "contrast")
        names, draws = batch.contrast_keys, self.settings.data.draws
        draw = self.preference.draw_noise(policy, names, key, batch.explored, draws)
        return NoisyPairs(batch.explored, batch.main, draw, batch.contrast_conditioning)

    def _bonus(self, errors: PairErrors) -> tuple[Tensor, Metrics]:
        beta = self.settings.bonus_beta
        bonus = exploration_bonus(*errors.four, beta=beta)
        margin = pair_margin(*errors.four, beta=beta)
        return bonus, as_metrics({"train/bonus": bonus, "train/bonus_margin": margin})
