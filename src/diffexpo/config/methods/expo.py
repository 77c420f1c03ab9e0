"""EXPO: settings and facts."""

import math
from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.card import Run, Work
from diffexpo.config.methods.data import Pairs
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.section import Fraction, NotNegative, Positive

LITERAL_SCALE = 1000.0
"""T of the papers, which is merged into our beta: `beta_explore: literal` is beta / T."""


class ExpoConfig(DiffusionDpoConfig):
    """EXPO: Diffusion-DPO with a bonus for exploring. With alpha 0 it is Diffusion-DPO bit for bit."""

    type: Literal["expo"] = "expo"  # type: ignore[assignment]  # its own name
    """The training method."""
    alpha: NotNegative = 0.0
    """Exploration bonus (EXPO eq. 3). Up to 1 (matched beta) no labelled preference is reversed. The papers
    state no value."""
    beta_explore: Literal["matched", "literal"] | Positive = "matched"
    """beta inside the bonus: the same as `beta`, the papers' literal beta without T (beta / 1000), or a
    number."""
    contrast_fraction: Fraction = 0.25
    """Contrast pairs per preference pair in a batch when alpha > 0."""

    title = "EXPO"
    papers = ("zhan_expo", "wallace2024diffusiondpo")

    @property
    def data(self) -> Pairs:
        return Pairs(self.contrast_fraction if self.alpha > 0 else 0.0, self.draws)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",) if self.alpha > 0 else super().versions

    @property
    def initial_loss(self) -> float | None:
        """As of Diffusion-DPO while there is no bonus."""
        return super().initial_loss if self.alpha == 0 else None

    @property
    def bonus_beta(self) -> float:
        """beta inside the bonus as a number: beta, beta / 1000 ("literal") or the number given."""
        if self.beta_explore == "matched":
            return self.beta
        return self.beta / LITERAL_SCALE if self.beta_explore == "literal" else float(self.beta_explore)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        if self.alpha == 0:
            return
        head = f"algorithm.alpha = {self.alpha:g}"
        if self.kind == "simpo":
            yield (
                f"{head} with kind: simpo: the bonus measures errors against the reference, simpo has none; "
                "the two terms would speak of different rewards"
            )
        if run.explore.agents == 1:
            yield (
                f"{head} with explore.agents = 1: both agents are the same weights, so exploration and main "
                "samples follow one distribution and the bonus is noise; use agents 2 or alpha 0"
            )
        if run.explore.iterations == 1:
            yield f"{head} with explore.iterations = 1: no sample is ever explored, the bonus never acts"
        if self.contrast_fraction == 0:
            yield f"{head} with algorithm.contrast_fraction = 0: the bonus has no contrast pairs"
        if self.auto_beta:
            yield (
                f"algorithm.auto_beta = true with {head}: the bonus keeps its beta while that of the pairs "
                "falls, so alpha <= 1 would no longer protect labels; use one of them"
            )

    def notes(self, run: Run) -> Iterator[str]:
        strength = self.alpha * self.bonus_beta / self.beta
        if strength > 1:
            yield (
                f"algorithm.alpha x beta_explore / beta = {strength:.3g} > 1: where the loser was explored, "
                f"the labelled margin stalls at h = {-math.log(strength - 1):+.3g}"
            )
        if self.alpha > 0 and self.beta_explore == "literal":
            yield (
                "algorithm.beta_explore = literal: the bonus acts with alpha x beta_explore / beta = "
                f"{strength:.3g}, nearly inert unless alpha is in the hundreds"
            )
        if self.alpha > 0 and self.kind != "sigmoid":
            yield f"algorithm.kind = {self.kind}: alpha <= 1 protects labels only with kind sigmoid"
        yield from super().notes(run)

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if run.explore.agents == 2 and self.collects(run):
            yield "two agents", "xiong2024iterative"
        if self.alpha > 0:
            yield "exploration bonus", "zhan_online_rlhf"
            yield "form of the exploration bonus", "chen2025sepopo"
