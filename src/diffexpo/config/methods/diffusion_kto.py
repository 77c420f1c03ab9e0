"""Diffusion-KTO: settings and facts."""

from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import ForwardConfig, ReferencedConfig
from diffexpo.config.methods.data import Images
from diffexpo.config.section import NotNegative, Positive


class DiffusionKtoConfig(ForwardConfig, ReferencedConfig):
    """Diffusion-KTO (arXiv 2404.04465): images that are desirable or not, no pairs."""

    type: Literal["diffusion_kto"] = "diffusion_kto"
    """The training method."""
    beta: Positive = 1000.0
    """Multiplies error_ref - error without the factor 1/2: 1000 acts like 2000 of Diffusion-DPO (the authors'
    code: 1000; the paper: 5000)."""
    utility: Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"] = (
        "sigmoid"
    )
    """Shape of human utility (section 4 of the paper; its best is `sigmoid`)."""
    baseline: Literal["mean", "class_mean"] = "mean"
    """Estimate of the KL that utilities are measured from: mean of error_ref - error clamped at 0, or the
    average of the means of both classes, not clamped."""
    desirable_weight: NotNegative = 1.0
    """Weight of desirable images."""
    undesirable_weight: NotNegative = 1.0
    """Weight of undesirable images."""
    desirable_fraction: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Share of desirable images in the draw (the authors' positive ratio: 0.8)."""

    title = "Diffusion-KTO"
    papers = ("li2024diffusionkto",)
    restraint = "raise algorithm.beta"

    @property
    def data(self) -> Images:
        """An image that equals its prompt's mean is neither desirable nor not."""
        return Images(keep="decided", desirable_fraction=self.desirable_fraction)

    @property
    def measures_batch(self) -> bool:
        """The baseline is that of the whole batch."""
        return True

    @property
    def initial_loss(self) -> float | None:
        """1/2, the sigmoid's loss at the reference, where both classes weigh 1."""
        is_plain = self.utility == "sigmoid" and self.desirable_weight == 1.0
        return 0.5 if is_plain and self.undesirable_weight == 1.0 else None
