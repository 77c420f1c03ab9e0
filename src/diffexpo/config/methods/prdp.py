"""PRDP: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.bases import ReferencedConfig, TrajectoryConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import TransitionPairs
from diffexpo.config.section import Positive


class PrdpConfig(TrajectoryConfig, ReferencedConfig):
    """PRDP (arXiv 2402.08714), experimental: no official code, the paper's numbers are not reproduced."""

    type: Literal["prdp"] = "prdp"
    """The training method."""
    beta: Positive = 1.0
    """Scale of the summed log-ratio that is regressed on reward differences (the paper's value is not
    verified)."""
    clip_range: Positive = 1e-4
    """Each transition's log-ratio to the sampling policy is clipped to plus or minus this (not verified)."""

    title = "PRDP"
    papers = ("deng2024prdp",)
    restraint = "raise algorithm.beta"

    @property
    def data(self) -> TransitionPairs:
        return TransitionPairs("every", self.timestep_fraction, whole_pairs=True)

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        if self.timestep_fraction < 1:
            yield (
                f"algorithm.timestep_fraction = {self.timestep_fraction:g} with algorithm.type = prdp: the "
                "log-ratio of a trajectory is the sum over all its steps; set it to 1"
            )
