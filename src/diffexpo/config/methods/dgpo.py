"""DGPO: settings and facts."""

from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import AdvantageConfig, ForwardConfig, LogisticConfig
from diffexpo.config.methods.data import Images
from diffexpo.config.section import Fraction, Positive


class DgpoConfig(ForwardConfig, LogisticConfig, AdvantageConfig):
    """DGPO (arXiv 2510.08425): errors of a whole group, weighted by advantage, within one sigmoid."""

    type: Literal["dgpo"] = "dgpo"
    """The training method."""
    beta: Positive = 100.0
    """Multiplies the group's mean of advantage times error difference: two images of advantage 1 and -1 are
    Diffusion-DPO at this very beta (flow DPO: 100)."""
    clip_range: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Images whose ratio to the policy at the iteration's start is beyond 1 plus or minus this get no
    gradient; null is off."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (0: prompts are trained as they were sampled)."""

    title = "DGPO"
    papers = ("luo2025dgpo",)

    @property
    def data(self) -> Images:
        return Images(global_std=self.global_std, whole_groups=True)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",) if self.clip_range is None else ("reference", "old")
