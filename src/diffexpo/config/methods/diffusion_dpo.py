"""Diffusion-DPO: settings and facts."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from diffexpo.config.methods.bases import MarginConfig
from diffexpo.config.methods.card import Run, Work
from diffexpo.config.section import Fraction, NotNegative


class DiffusionDpoConfig(MarginConfig):
    """Diffusion-DPO and its variants (arXiv 2311.12908)."""

    type: Literal["diffusion_dpo"] = "diffusion_dpo"
    """The training method."""
    kind: Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "linear", "simpo"] = "sigmoid"
    """Loss on the pair's logit."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Assumed share of flipped labels, for `cdpo` and `robust`."""
    simpo_gamma: NotNegative = 0.0
    """Target margin of `simpo` (reference-free)."""
    sft_weight: NotNegative = 0.0
    """Adds this times the winner's error: an anchor against both errors rising."""
    uncertainty: Literal["off", "optimism", "pessimism"] = "off"
    """Offset Gamma_w - Gamma_l in the logit: `optimism` fits r + Gamma, `pessimism` (the printed sign of eq.
    5) r - Gamma."""
    uncertainty_scale: NotNegative = 1.0
    """Gamma = scale x population std of the per-prompt z-scored rewards across scorers (needs two or more
    rewards)."""
    safeguard: bool = False
    """Scale each loser's gradient down where a step would raise the winner's error (Diffusion-SDPO, arXiv
    2511.03317)."""
    safeguard_mu: Fraction = 0.9
    """Share of the winner's own descent that must remain under `safeguard` (the authors: 0.9 for SD 1.5, 0.6
    for SDXL)."""
    auto_beta: bool = False
    """At every step, take the beta at which a pair of the batch's mean margin has the gradient factor
    `auto_beta_target`; `beta` is then the largest. Costs a pass without gradient."""
    auto_beta_target: float = Field(default=0.2, gt=0.0, lt=0.5)
    """Gradient factor sigmoid(-h) that `auto_beta` aims at (SimpleTuner: 0.2)."""

    title = "Diffusion-DPO"
    papers: ClassVar[tuple[str, ...]] = ("wallace2024diffusiondpo",)

    @property
    def versions(self) -> tuple[str, ...]:
        return () if self.kind == "simpo" else ("reference",)

    @property
    def measures_batch(self) -> bool:
        return self.auto_beta

    @property
    def needs_uncertainty(self) -> bool:
        return self.uncertainty != "off"

    @property
    def initial_loss(self) -> float | None:
        """The loss at margin 0, ln 2 of the sigmoid; None where another term or kind joins in."""
        return self.start_loss if self.kind in ("sigmoid", "linear") else None

    @property
    def start_loss(self) -> float | None:
        if self.sft_weight or self.needs_uncertainty or self.has_guided_anchor:
            return None
        return START_LOSSES.get(self.kind)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        if self.label_smoothing > 0 and self.kind not in ("cdpo", "robust"):
            yield (
                f"algorithm.label_smoothing = {self.label_smoothing:g} with kind: {self.kind}: only cdpo and "
                "robust assume flipped labels; choose one of them or set it to 0"
            )
        if self.simpo_gamma > 0 and self.kind != "simpo":
            yield (
                f"algorithm.simpo_gamma = {self.simpo_gamma:g} with kind: {self.kind}: only simpo has a "
                "target margin"
            )
        if self.needs_uncertainty:
            yield from self._uncertainty(run)
        if self.auto_beta and self.kind == "simpo":
            yield (
                "algorithm.auto_beta = true with kind: simpo: its margins do not start at 0, so their size "
                "says nothing of saturation"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        if self.kind in ("cdpo", "robust") and self.label_smoothing == 0:
            yield f"algorithm.kind = {self.kind} with label_smoothing 0 is the same loss as sigmoid"
        if self.kind == "simpo" and self.moves_reference:
            yield f"algorithm.reference = {self.reference} is not used: simpo has no reference"

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if self.kind in KINDS:
            yield f"loss {self.kind}", KINDS[self.kind]
        if self.safeguard:
            yield "safeguard of winners", "fu2025sdpo"
        if self.auto_beta:
            yield "automatic beta", "simpletuner"

    def _uncertainty(self, run: Run) -> Iterator[str]:
        head = f"algorithm.uncertainty = {self.uncertainty}"
        count = sum(reward.role == "train" for reward in run.rewards)
        if count < 2:
            yield (
                f"{head} with {count} train reward{'s' * (count != 1)}: Gamma is the spread between scorers, "
                "one scorer has none; add a second train reward"
            )
        if self.kind == "simpo":
            yield (
                f"{head} with kind: simpo: the offset belongs to the logit against a reference, simpo has "
                "none"
            )
        if self.uncertainty_scale == 0:
            yield f"{head} with algorithm.uncertainty_scale = 0: the offset is always 0; use uncertainty: off"


START_LOSSES = dict.fromkeys(("sigmoid", "cdpo", "robust"), math.log(2)) | {"linear": 0.3125}
"""Loss at margin 0 of the kinds that have one to be compared with."""
KINDS = {
    "hinge": "zhao2023slic",
    "ipo": "azar2024ipo",
    "cdpo": "mitchell2023cdpo",
    "robust": "chowdhury2024robust",
    "linear": "li2026lineardpo",
    "simpo": "meng2024simpo",
}
"""Works that the kinds of loss come from."""
