"""The base's prediction, guided or not, that a policy's is pulled to: beside a preference, or alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffexpo.algorithms.forward import with_rows_replaced
from diffexpo.diffusion.guidance import classifier_free_guidance
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.types import Conditioning, Policy


@dataclass(frozen=True)
class Anchor:
    """Where predictions are pulled to, and how strongly beside a preference: `version` of the weights holds
    the base, `empty` is the one-row conditioning of the empty prompt, needed with guidance."""

    version: Literal["reference", "base"]
    weight: float
    guidance: float
    empty: Conditioning | None

    def predict(self, policy: Policy, images: NoisyImages, reference: Tensor | None = None) -> Tensor:
        """e_u + g (e_c - e_u) of all images, without gradient; e_c alone for g = 1.

        Rows whose prompt is the empty one have e_c = e_u, and so the unguided prediction. `reference` is the
        prediction under "reference", where that is at hand.
        """
        conditional = None if self.version == "base" else reference
        if conditional is None:
            conditional = self.conditional(policy, images)
        if self.guidance == 1 or self.empty is None:
            return conditional
        return classifier_free_guidance(self.unconditional(policy, images), conditional, scale=self.guidance)

    def conditional(self, policy: Policy, images: NoisyImages) -> Tensor:
        """e_c, the base's prediction for the images' prompts."""
        return images.predict_under(policy, self.version)

    def unconditional(self, policy: Policy, images: NoisyImages) -> Tensor:
        """e_u, the base's prediction for the empty prompt."""
        assert self.empty is not None  # its makers refuse guidance without it
        every = torch.ones(len(images.t), dtype=torch.bool)
        conditioning = with_rows_replaced(images.conditioning, self.empty, every)
        return replace(images, conditioning=conditioning).predict_under(policy, self.version)
