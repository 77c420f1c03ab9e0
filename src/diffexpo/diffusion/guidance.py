"""Combining several predictions of one network into a guided one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from diffexpo.types import Conditioning

IMAGE_CONDITION = "image_condition"
"""Name under which a conditioning holds clean latents (B,C,h,w) for a model that takes an image; zeros are no
image."""


class DoubleGuidance(NamedTuple):
    """Scales of `double_guidance`; image 1 and text 1 turn it off."""

    image_scale: float
    text_scale: float


def with_image(conditioning: Conditioning, image: Tensor) -> Conditioning:
    """The conditioning with clean latents (B,C,h,w) added to its text; zeros stand for no image."""
    return Conditioning({**conditioning.tensors, IMAGE_CONDITION: image})


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, *, scale: float) -> Tensor:
    """Prediction pushed from the unconditional towards the conditional one.

    unconditional + scale (conditional - unconditional)

    Args:
        unconditional: (B, ...) prediction under the empty or the negative prompt.
        conditional: (B, ...) prediction under the prompt.
        scale: 0 unconditional, 1 conditional, larger exaggerates the prompt.
    Returns:
        (B, ...). Equal predictions are returned whatever the scale.
    Source: Classifier-free guidance (arXiv 2207.12598) eq. 6, with scale = 1 + w. A negative prompt takes the
        place of the empty one, which is how EXPO's negative prompts act.
    """
    return unconditional + scale * (conditional - unconditional)


def double_guidance(
    unconditional: Tensor, image: Tensor, full: Tensor, *, image_scale: float, text_scale: float
) -> Tensor:
    """Guidance towards an image condition and, beyond it, towards a text.

    unconditional + image_scale (image - unconditional) + text_scale (full - image)

    Args:
        unconditional: (B, ...) prediction with neither condition.
        image: (B, ...) prediction with the image condition only.
        full: (B, ...) prediction with image and text.
        image_scale, text_scale: 1 and 1 give `full`; 1 and 0 give `image`.
    Returns:
        (B, ...).
    Source: InstructPix2Pix (arXiv 2211.09800) eq. 3; the improvement model's eq. 9 (image 3.0, text 3.5).
    """
    return unconditional + image_scale * (image - unconditional) + text_scale * (full - image)
