"""D3PO: settings and facts."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from diffexpo.config.methods.bases import ReferencedConfig, TrajectoryConfig
from diffexpo.config.methods.data import TransitionPairs
from diffexpo.config.section import Positive


class D3poConfig(TrajectoryConfig, ReferencedConfig):
    """D3PO (arXiv 2311.13231): one preference between two trajectories, applied to each transition."""

    type: Literal["d3po"] = "d3po"
    """The training method."""
    beta: Positive = 0.1
    """Multiplies the difference of mean log-ratios (the authors: 0.1; nearly linear there, so the learning
    rate sets the step)."""
    clip_range: Positive = 0.1
    """Ratios are clamped to 1 plus or minus this (the authors: 0.1)."""

    title: ClassVar[str] = "D3PO"
    papers: ClassVar[tuple[str, ...]] = ("yang2024d3po",)
    stages: ClassVar[tuple[str, ...]] = ("collect", "pair", "train", "evaluate")
    orders_by_number: ClassVar[bool] = False
    restraint: ClassVar[str] = "raise algorithm.beta"

    @property
    def data(self) -> TransitionPairs:
        return TransitionPairs("decided", self.timestep_fraction)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def initial_loss(self) -> float:
        return math.log(2)
