"""Guidance distillation (arXiv 2210.03142): the conditional prediction alone learns what guidance makes of
two, so that images are drawn without guidance at half the cost.
"""

from __future__ import annotations

from torch import Tensor

from diffexpo.algorithms.anchor import Anchor
from diffexpo.algorithms.forward import RowLosses, squared_distance
from diffexpo.algorithms.scored import ScoredMethod
from diffexpo.config.methods.guidance_distillation import GuidanceDistillationConfig
from diffexpo.diffusion.guidance import classifier_free_guidance
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.errors import ConfigError
from diffexpo.types import Conditioning, Policy, ScoredBatch


def guidance_distillation_loss(
    prediction: Tensor, unconditional: Tensor, conditional: Tensor, *, guidance: float
) -> Tensor:
    """Mean squared difference of a prediction from another model's guided one.

    mean over C,H,W of (v - [u + g (c - u)])^2

    Args:
        prediction: (B, ...) v, the policy's for the prompt, without guidance: eps, v or a velocity.
        unconditional: (B, ...) u, the frozen base's at the same x_t and t for the empty prompt.
        conditional: (B, ...) c, the base's for the prompt. No gradient reaches u and c.
        guidance: g, the scale that is distilled; 1 is the base's own conditional prediction.
    Returns:
        (B,). A prediction equal to the guided one gives 0, the base's own (g - 1)^2 mean (c - u)^2.
    Source: On Distillation of Guided Diffusion Models (arXiv 2210.03142), section 3.1, stage one, whose scale
        w is g - 1. There the network reads w, drawn anew for each row, and estimates of x0 are compared with
        a weight of the noise level; here g is fixed, nothing is added to the network, and predictions are
        compared in the model's own space at weight 1, as in the anchor of losses on pairs.
    """
    v, u, c = (at_least_float32(given) for given in (prediction, unconditional, conditional))
    return squared_distance(v, classifier_free_guidance(u, c, scale=guidance))


class GuidanceDistillation(ScoredMethod):
    """Guidance distillation on a `ScoredBatch`, of which only images and prompts are looked at."""

    settings: GuidanceDistillationConfig

    def __init__(self, settings: GuidanceDistillationConfig, empty: Conditioning | None = None) -> None:
        """`empty`: one-row conditioning of the empty prompt, the other side of guidance."""
        super().__init__(settings, empty)
        if empty is None:
            raise ConfigError(
                f"algorithm.guidance is {settings.guidance:g}, but no conditioning of the empty prompt was "
                "given; pass `empty`"
            )
        self.base = Anchor(settings.anchor_version, 1.0, settings.guidance, empty)

    def row_losses(self, policy: Policy, batch: ScoredBatch, images: NoisyImages) -> RowLosses:
        """The distance from the guided base of each image, and the base's own distance from it."""
        branches = self.base.unconditional(policy, images), self.base.conditional(policy, images)
        guidance, current = self.settings.guidance, images.predict_under(policy, "current")
        loss = guidance_distillation_loss(current, *branches, guidance=guidance)
        gap = guidance_distillation_loss(branches[1], *branches, guidance=guidance)
        return loss, {"train/guidance_gap": gap}
