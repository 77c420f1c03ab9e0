"""ORPO: settings and facts."""

from typing import Literal

from diffexpo.config.methods.bases import PairsConfig
from diffexpo.config.section import Positive


class OrpoConfig(PairsConfig):
    """ORPO (arXiv 2403.07691): supervised fine-tuning on winners and an odds ratio, without a reference."""

    type: Literal["orpo"] = "orpo"
    """The training method."""
    beta: Positive = 1.0
    """Scale of the error e in the likelihood p = exp(-beta e). At 1 the supervised term is -log p, as in the
    paper. Below 1/e the margin is log(e_l / e_w) whatever beta is; above, it is beta (e_l - e_w). Not the
    beta of Diffusion-DPO."""
    weight: Positive = 0.1
    """lambda, the weight of the odds-ratio term added to the winner's error (TRL's default for language
    models: 0.1)."""

    title = "ORPO"
    papers = ("hong2024orpo",)
