"""Reward-weighted regression: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import Images
from diffexpo.config.methods.own_images import no_offline
from diffexpo.config.section import Positive


class RwrConfig(ForwardConfig):
    """Reward-weighted regression, the baseline of the DDPO paper (arXiv 2305.13301)."""

    type: Literal["rwr"] = "rwr"
    """The training method."""
    kind: Literal["exponential", "sparse"] = "exponential"
    """Weights B softmax(rewards / temperature), or equal weights above a percentile and 0 below."""
    scope: Literal["prompt", "global"] = "prompt"
    """Which rewards an image's is compared with: those of its prompt in its collection, or those of its whole
    collection (then prompts whose images always score high are learned most)."""
    temperature: Positive = 5.0
    """Divides the reward (the authors' "temperature" 1/5 for JPEG kilobytes multiplies it). In units of the
    reward: set it to a fraction of the reward's spread within a prompt."""
    percentile: float = Field(default=90.0, ge=0.0, lt=100.0)
    """Smallest percentile of the kept images, for `sparse` (the authors: 90 or 95)."""

    title = "RWR"
    papers = ("peters2007rwr", "lee2023aligning", "black2024ddpo")

    @property
    def data(self) -> Images:
        return Images(weigh_scope=self.scope)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        yield from no_offline(
            run,
            "its images have won or lost pairs but have no reward, so exp(reward / temperature) is not "
            "defined for them",
        )
