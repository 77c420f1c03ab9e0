"""Supervised fine-tuning: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.config.methods.card import Run, Work
from diffexpo.config.methods.data import Images


class SftConfig(ForwardConfig):
    """Supervised fine-tuning on chosen images: winners of D_off, and the best of each prompt (RAFT, best of
    n)."""

    type: Literal["sft"] = "sft"
    """The training method."""
    keep: Literal["best", "desirable", "all"] = "best"
    """Images learned from: the best of each prompt (RAFT), all above their prompt's mean, or all. Others
    never enter a batch, so that the mean is over what was kept."""

    title = "SFT"

    @property
    def data(self) -> Images:
        return Images(keep=self.keep)

    def works(self, run: Run) -> Iterator[Work]:
        """The loss is that of the model at hand: only a flow model takes the samplers of flows."""
        is_flow = run.evaluation.sampler.name.startswith("flow")
        yield f"method {self.title}", "liu2022rectifiedflow" if is_flow else "ho2020ddpm"
        if self.keep == "best" and self.collects(run):
            yield "best of n (RAFT)", "dong2023raft"
