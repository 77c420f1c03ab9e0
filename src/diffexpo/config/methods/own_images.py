"""What contradicts a method that learns from its own images only. Imports without torch."""

from __future__ import annotations

from typing import ClassVar

from diffexpo.config.methods.bases import AdvantageConfig, ForwardConfig, ReferencedConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import Images


def no_offline(run: Run, why: str) -> list[str]:
    """Offline images, which the method cannot learn from, with the reason."""
    if run.offline.source is None:
        return []
    problem = (
        f"offline.source = {run.offline.source!r} with algorithm.type = {run.algorithm.type}: {why}; set "
        "offline.source=null and explore.iterations to 2 or more"
    )
    return [problem]


def against_old_policy(run: Run) -> list[str]:
    """Images that the old policy did not draw, for a loss that compares the policy with what drew them."""
    explore, head = run.explore, f"with algorithm.type = {run.algorithm.type}"
    problems = no_offline(
        run,
        "the loss compares the policy with the one that drew the images, and nobody knows which drew these",
    )
    if explore.agents == 2:
        problems.append(
            f"explore.agents = 2 {head}: the main agent's images are drawn by the iterate before the old "
            "policy, against which the loss measures; set explore.agents=1"
        )
    if explore.iterations > 2 and run.hybrid.decay > 0:
        problems.append(
            f"hybrid.decay = {run.hybrid.decay:g} {head}: images of earlier collections were drawn by "
            "earlier policies than the old one, against which the loss measures; set hybrid.decay=0"
        )
    return problems


def guided_drawing(run: Run) -> list[str]:
    """A note where images are drawn with guidance and trained without."""
    guidance = run.explore.sampler.guidance
    if guidance == 1.0:
        return []
    note = (
        f"explore.sampler.guidance = {guidance:g} with algorithm.type = {run.algorithm.type}: images are "
        "drawn with guidance and trained without, so what drew them is not quite the old policy; the authors "
        "draw with guidance 1"
    )
    return [note]


class AgainstOldPolicyConfig(ForwardConfig, ReferencedConfig, AdvantageConfig):
    """Methods whose loss compares the policy with the one that drew the images."""

    restraint: ClassVar[str] = "raise algorithm.kl_weight"

    @property
    def data(self) -> Images:
        return Images(global_std=self.global_std)

    def problems(self, run: Run) -> list[str]:
        return [*super().problems(run), *against_old_policy(run)]

    def notes(self, run: Run) -> list[str]:
        return [*super().notes(run), *guided_drawing(run)]
