"""DDPO: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.bases import ClippedRatioConfig
from diffexpo.config.methods.card import Run, Work
from diffexpo.config.methods.data import RunningAdvantage, Transitions
from diffexpo.config.section import Count, Positive


class DdpoConfig(ClippedRatioConfig):
    """DDPO (arXiv 2305.13301)."""

    type: Literal["ddpo"] = "ddpo"
    """The training method."""
    estimator: Literal["importance_sampling", "score_function"] = "importance_sampling"
    """Clipped importance sampling (several updates from one collection), or the score function (one
    update)."""
    advantage_clip: Positive = 5.0
    """Advantages are clipped to plus or minus this (the authors: 5)."""
    buffer_size: Count = 16
    """Rewards remembered for each prompt (the authors: 16 for compression, 32 for aesthetics)."""
    min_count: Count = 16
    """A prompt with fewer remembered rewards is compared with the whole batch (the authors: 16)."""

    title = "DDPO"
    papers = ("black2024ddpo",)
    group_size = 1
    restraint = "lower algorithm.clip_range"

    @property
    def data(self) -> Transitions:
        advantage = RunningAdvantage(self.buffer_size, self.min_count, self.advantage_clip)
        return Transitions(advantage, self.timestep_fraction)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        if self.estimator == "score_function" and run.training.steps > 1:
            yield (
                f"algorithm.estimator = score_function with training.steps = {run.training.steps}: after the "
                "first update the images are no longer the policy's own and the estimate is biased; set "
                "training.steps=1 or importance_sampling"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        if self.min_count > self.buffer_size:
            yield (
                "algorithm.min_count exceeds buffer_size: every image is compared with the whole batch, not "
                "with its prompt's"
            )

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if self.estimator == "importance_sampling":
            yield "clipped ratio", "schulman2017ppo"
