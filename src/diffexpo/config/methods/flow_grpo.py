"""Flow-GRPO: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import AdvantageConfig, ClippedRatioConfig, ReferencedConfig
from diffexpo.config.methods.card import Run, Work
from diffexpo.config.methods.data import GroupAdvantage, Transitions
from diffexpo.config.section import Count, NotNegative

FLOW_SDES_WITH_TIME = ("flow_grpo", "dance")
"""SDEs whose noise grows with the time step, which Flow-GRPO's own KL and GRPO-Guard divide by or leave
out."""


class FlowGrpoConfig(ClippedRatioConfig, ReferencedConfig, AdvantageConfig):
    """Flow-GRPO (arXiv 2505.05470) and its relatives."""

    type: Literal["flow_grpo"] = "flow_grpo"
    """The training method."""
    kl_weight: NotNegative = 0.04
    """Weight of the KL to the reference (the authors: 0.04; 0.01 with PickScore)."""
    kl: Literal["flow_grpo", "exact"] = "flow_grpo"
    """Flow-GRPO's KL leaves out a factor of the time step; `exact` is the Gaussian KL, 4 to 112 times larger
    on its schedule."""
    ratio: Literal["plain", "guard"] = "plain"
    """`guard` centres and scales the log-ratio (GRPO-Guard, arXiv 2510.22319); use clip_range 2e-6 with
    it."""
    window: int | None = Field(default=None, ge=1)
    """MixGRPO: only so many transitions, a sliding window, are stochastic and trained; null is all."""
    window_every: Count = 25
    """Iterations after which the window moves by one transition towards the image (MixGRPO: 25)."""
    timestep_fraction: float = Field(default=0.99, gt=0.0, le=1.0)
    """Share of a trajectory's transitions that is trained (the authors: 0.99, which leaves out the last)."""

    title = "Flow-GRPO"
    papers = ("liu2025flowgrpo", "schulman2017ppo")
    restraint = "raise algorithm.kl_weight"

    @property
    def data(self) -> Transitions:
        """The authors train the first, noisiest transitions."""
        return Transitions(
            GroupAdvantage(self.global_std, self.advantage_clip),
            self.timestep_fraction,
            takes_first=True,
            needs_means=self.ratio == "guard",
        )

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_weight > 0 else ()

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        sampler = run.explore.sampler
        if self.window is not None and self.window > sampler.steps:
            yield (
                f"algorithm.window = {self.window} with explore.sampler.steps = {sampler.steps}: the window "
                "holds more steps than there are"
            )
        if self.window is not None and sampler.random_steps is not None:
            yield (
                "algorithm.window with explore.sampler.random_steps: both say which steps are random; set "
                "one of them to null"
            )
        has_time = sampler.name == "flow_sde" and sampler.sde in FLOW_SDES_WITH_TIME
        kernel = f"flow_sde, {sampler.sde}" if sampler.name == "flow_sde" else sampler.name
        if self.kl == "flow_grpo" and self.kl_weight > 0 and not has_time:
            yield (
                f"algorithm.kl = flow_grpo with the sampler {kernel}: it leaves out a factor of the time "
                "step that only the kernels flow_grpo and dance of flow_sde have; set algorithm.kl=exact"
            )
        if self.ratio == "guard" and not has_time:
            yield (
                f"algorithm.ratio = guard with the sampler {kernel}: it divides by the time step, in "
                "proportion to which only the kernels flow_grpo and dance of flow_sde move; set "
                "algorithm.ratio=plain"
            )

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if self.ratio == "guard":
            yield "ratio of GRPO-Guard", "wang2025grpoguard"
        if self.window is not None:
            yield "window of MixGRPO", "li2025mixgrpo"
