"""SPO: settings and facts."""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import LogisticConfig, TrajectoryConfig
from diffexpo.config.methods.card import Run, Work
from diffexpo.config.methods.data import Branches, TransitionPairs
from diffexpo.config.schema import SamplerConfig
from diffexpo.config.section import Positive
from diffexpo.config.worlds import world_of


class SpoConfig(TrajectoryConfig, LogisticConfig):
    """SPO (arXiv 2406.04314): preferences between candidates of one transition."""

    type: Literal["spo"] = "spo"
    """The training method."""
    beta: Positive = 10.0
    """Multiplies the difference of mean log-ratios (the authors: 10)."""
    clip_range: Positive = 0.1
    """Ratios are clamped to 1 plus or minus this (the authors: 0.1)."""
    num_candidates: int = Field(default=4, ge=2)
    """Candidates drawn from the same x_t (the authors: 4 for SD 1.5, 2 for SDXL)."""
    first_transition: int = Field(default=4, ge=0)
    """Transitions before this one are not branched (the authors' `divert_start_step`: 4)."""
    threshold: float = Field(default=0.3, ge=0.0, lt=1.0)
    """A pair is kept if its preference probabilities differ by more than this (the authors: 0.3; SDXL
    0.4)."""
    judge: str | None = None
    """What ranks the candidates: a step-aware judge (a folder, or `emoji:step_judge`) that reads a candidate
    and its noise level; or null, the run's rewards on the image of its predicted x0. The authors: a
    step-aware judge of that image."""

    title = "SPO"
    papers = ("liang2024spo",)
    group_size = 1
    story = "candidates of single denoising steps are ranked, and the better ones become likelier."

    @property
    def data(self) -> TransitionPairs:
        """Probabilities of best and worst differ by tanh(gap / 2), so the gap of scores is 2
        atanh(threshold)."""
        gap = 2 * math.atanh(self.threshold)
        branches = Branches(self.num_candidates, self.first_transition, gap, self.judge)
        return TransitionPairs("branches", self.timestep_fraction, branches=branches)

    @property
    def named_files(self) -> tuple[str, ...]:
        return () if self.judge is None else (self.judge,)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        sampler = run.explore.sampler
        # The last step of ddpm and ddim adds no noise: its candidates would be equal.
        branchable = sampler.steps - (sampler.name in ("ddpm", "ddim"))
        if self.first_transition >= branchable:
            yield (
                f"algorithm.first_transition = {self.first_transition} with explore.sampler.steps = "
                f"{sampler.steps}: no step is branched (the first {branchable} can be); set it below "
                f"{branchable}"
            )
        if self.judge is not None and not self.judge.strip():
            yield (
                "algorithm.judge is empty: name a step-aware judge (a folder, or emoji:step_judge), or null "
                "to let the rewards rank"
            )

    def _mixture(self, run: Run) -> Iterator[str]:
        yield from super()._mixture(run)
        if sum(reward.role == "train" for reward in run.rewards) > 1 and run.mixture.kind == "global":
            yield (
                f"mixture.kind = global with algorithm.type = {self.type}: candidates are ranked while they "
                "are drawn, so all prompts are never at hand and the ranking would depend on the batch; use "
                "zscore or rank"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        if self.judge is not None:
            yield (
                f"algorithm.judge = {self.judge} ranks the candidates: the rewards only score finished "
                "images, for the metrics"
            )

    def one_size_reason(self) -> str | None:
        if self.judge is None:
            return None
        return (
            "algorithm.judge was trained on latents of one shape; set algorithm.judge=null to let the "
            "rewards rank, or"
        )

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if self.judge and not world_of(self.judge):
            yield f"step-aware judge {self.judge}", None

    def evaluations_per_image(self, sampler: SamplerConfig, evaluations: int) -> int:
        """Without a step-aware judge each candidate of a branched step is evaluated."""
        if self.judge is not None:
            return evaluations
        branched = max(0, sampler.steps - 1 - self.first_transition)
        return evaluations + evaluations // sampler.steps * branched * (self.num_candidates - 1)
