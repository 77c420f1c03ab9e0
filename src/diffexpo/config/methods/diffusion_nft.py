"""DiffusionNFT: settings and facts."""

from typing import Literal

from diffexpo.config.methods.own_images import AgainstOldPolicyConfig
from diffexpo.config.section import Fraction, NotNegative, Positive


class DiffusionNftConfig(AgainstOldPolicyConfig):
    """DiffusionNFT (arXiv 2509.16117): the forward process, an optimality in [0, 1] for each image, and an
    old policy."""

    type: Literal["diffusion_nft"] = "diffusion_nft"
    """The training method."""
    beta: Positive = 1.0
    """Distance of the two implicit policies from the old one (the authors: 1.0; 0.1 for text rendering and
    several rewards). Not the beta of Diffusion-DPO."""
    kl_weight: NotNegative = 1e-4
    """Weight of the squared distance to the reference's prediction (the authors' `train.beta`: 1e-4)."""
    advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """Which advantages become optimalities."""
    old_decay: Literal["iteration", 0, 1, 2] = "iteration"
    """How the old policy follows: `iteration` holds what drew the images for the whole iteration; after each
    optimiser step, 0 follows at once, 1 with decay min(0.001 step, 0.5), 2 at once for 75 steps, then
    min(0.0075 (step - 75), 0.999). The authors use 0, 1 and 2 with one or two steps an iteration; with many
    steps an old policy that follows holds nothing back."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (the method is free of guidance: 0)."""

    title = "DiffusionNFT"
    papers = ("zheng2026diffusionnft",)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("old", "reference") if self.kl_weight > 0 else ("old",)
