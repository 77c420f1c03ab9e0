"""MaPO: settings and facts."""

from typing import Literal

from diffexpo.config.methods.bases import PairsConfig
from diffexpo.config.section import Count, Positive


class MapoConfig(PairsConfig):
    """MaPO (arXiv 2406.06424): reference-free margin on amplified errors."""

    type: Literal["mapo"] = "mapo"
    """The training method."""
    beta: Positive = 0.1
    """Weight of the margin term beside the winner's error (the authors: 0.1). Not the beta of
    Diffusion-DPO."""
    shift: Positive = 0.5
    """s in phi(e) = s e / (exp(s e) - 1) (the authors: 0.5)."""
    num_train_timesteps: Count = 1000
    """T, which multiplies the difference of the two phi (the authors: 1000)."""

    title = "MaPO"
    papers = ("hong2024mapo",)
