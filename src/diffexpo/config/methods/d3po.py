"""D3PO: settings and facts."""

from typing import Literal

from diffexpo.config.methods.bases import LogisticConfig, TrajectoryConfig
from diffexpo.config.methods.data import TransitionPairs
from diffexpo.config.section import Positive


class D3poConfig(TrajectoryConfig, LogisticConfig):
    """D3PO (arXiv 2311.13231): one preference between two trajectories, applied to each transition."""

    type: Literal["d3po"] = "d3po"
    """The training method."""
    beta: Positive = 0.1
    """Multiplies the difference of mean log-ratios (the authors: 0.1; nearly linear there, so the learning
    rate sets the step)."""
    clip_range: Positive = 0.1
    """Ratios are clamped to 1 plus or minus this (the authors: 0.1)."""

    title = "D3PO"
    papers = ("yang2024d3po",)
    stages = ("collect", "pair", "train", "evaluate")
    orders_by_number = False

    @property
    def data(self) -> TransitionPairs:
        return TransitionPairs("decided", self.timestep_fraction)
