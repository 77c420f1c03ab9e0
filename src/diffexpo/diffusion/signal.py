"""Signal and noise of one draw of a pair's margin, as an analysis of variance over pairs and draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffexpo.rng import torch_generator

RESAMPLES = 1000


class MarginSignal(NamedTuple):
    """What `margin_signal` finds, in units of the margins; `low` and `high` are the ends of the ratio's 95%
    interval."""

    signal: float
    noise: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """Signal over noise of one draw; not a number where nothing varies."""
        return self.signal / self.noise if self.noise > 0 else math.nan


def margin_signal(margins: Tensor, key: tuple[str | int, ...] = ("signal",)) -> MarginSignal:
    """Signal and noise of one draw's margin m_pk of P pairs at K independent draws (t, eps) each.

    noise^2  = mean_p  sum_k (m_pk - m_p)^2 / (K - 1)             m_p = mean_k m_pk
    signal^2 = mean_p  m_p^2 - noise^2 / K                        0 where that is negative

    Both squares are unbiased. The signal is the root mean square over pairs of what a pair's margin would be
    at infinitely many draws: the number that the sigmoid of the loss should see, whose sign and size differ
    from pair to pair. It is not the absolute mean over pairs, in which pairs that ought to count differently
    cancel, and which would say how many *pairs* a batch needs. So the ratio answers how many draws of a pair
    are worth averaging inside the sigmoid: K of them have K ratio^2 times as much signal as noise in the
    variance, equal at K = 1 / ratio^2; of one draw's variance ratio^2 / (1 + ratio^2) is signal.

    Args:
        margins: (P, K), P >= 2 and K >= 2.
        key: Names the bootstrap over pairs (`RESAMPLES`), from which the interval comes.
    Returns:
        Signal, noise and interval. Margins that do not depend on the draw have noise 0, and no ratio.
    Raises:
        ValueError: there are fewer than two pairs or draws.
    Source: one-way random-effects analysis of variance (Searle, Casella & McCulloch, Variance Components,
        1992, section 3.5), with the pairs' second moment about 0 instead of about their mean.
    """
    if margins.ndim != 2 or min(margins.shape) < 2:
        raise ValueError(f"margin_signal: margins are {tuple(margins.shape)}; expected (P, K), both >= 2")
    margins = margins.detach().cpu().to(torch.float64)
    (num_pairs, draws), generator = margins.shape, torch_generator(*key, "bootstrap")
    noise, own = margins.var(dim=1), margins.mean(dim=1).square()
    chosen = torch.randint(num_pairs, (RESAMPLES, num_pairs), generator=generator)
    ratios = _roots(noise[chosen].mean(dim=1), own[chosen].mean(dim=1), draws)
    known = ratios[ratios.isfinite()]
    low, high = known.quantile(known.new_tensor([0.025, 0.975])).tolist() if len(known) else (math.nan,) * 2
    noise2 = float(noise.mean())
    signal2 = max(0.0, float(own.mean()) - noise2 / draws)
    return MarginSignal(signal2**0.5, noise2**0.5, low, high)


def _roots(noise2: Tensor, own2: Tensor, draws: int) -> Tensor:
    """Ratios of signal and noise from mean squares."""
    return ((own2 - noise2 / draws).clamp(min=0) / noise2).sqrt()
