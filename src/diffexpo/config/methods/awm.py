"""AWM, advantage-weighted matching: settings and facts."""

from typing import Literal

from pydantic import Field

from diffexpo.config.methods.own_images import AgainstOldPolicyConfig
from diffexpo.config.section import Fraction, NotNegative, Positive


class AwmConfig(AgainstOldPolicyConfig):
    """AWM, advantage-weighted matching (arXiv 2509.25050): a clipped ratio on exp(-weighted error)."""

    type: Literal["awm"] = "awm"
    """The training method."""
    clip_range: Positive = 1e-4
    """The ratio is clipped to 1 plus or minus this (the range of Flow-GRPO; the sources leave it open)."""
    weighting: Literal["uniform", "t", "t_squared", "huber", "ghuber"] = "uniform"
    """Weight of the error at time t inside the log-probability."""
    power: float = Field(default=0.25, gt=0.0, le=1.0)
    """Exponent of the generalised Huber weighting `ghuber`."""
    kl_weight: NotNegative = 0.0
    """Weight of the squared distance to the reference's prediction."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows trained with the empty prompt (0: prompts are trained as they were sampled)."""

    title = "AWM"
    papers = ("xue2025awm",)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("old", "reference") if self.kl_weight > 0 else ("old",)
