"""One row of the contract: a model family as a tiny folder that anyone can build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn


def draw_with_guidance(
    pipeline: DiffusionPipeline,
    prompt: str,
    latents: Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
) -> Tensor:
    """The images (B,3,H,W) in [0, 1] of a pipeline with classifier-free guidance."""
    return pipeline(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        output_type="pt",
    ).images


def first_channels(tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The latents or the prediction (B,C,h,w); further channels are a learned variance, which nobody reads."""
    return tensor[:, : shape[0]]


def mean_of_the_posterior(vae: nn.Module, pixels: Tensor) -> Tensor:
    """The latents of pixels in [-1, 1], before shift and scale, without a random number."""
    return vae.encode(pixels).latent_dist.mean


@dataclass(frozen=True)
class Family:
    """What the contract needs to know of a model family.

    Args:
        name: Shown in the test's id.
        build: Writes a whole diffusers folder with random weights keyed by the seed: `build(folder, seed)`. From
            config classes alone: no download. Images of 16 x 16 pixels or so keep the contract cheap.
        pipeline_class: Name of the diffusers class that reads the folder, as in `model_index.json`.
        lora_targets: Endings of module names that get adapters.
        guidance: Scale of classifier-free guidance in the guided tests; 1 for a family whose pipeline has none.
        draw: `draw(pipeline, prompt, latents, steps, guidance, size)` calls the pipeline on latents (B,C,h,w) for images
            (B,3,H,W); size is (height, width) in pixels. Another one for families whose call takes other arguments or packed
            latents.
        unpack: `unpack(tensor, (C, h, w))` makes what goes into the network, or comes out of it, latents (B,C,h,w) again.
        clean_latents: `clean_latents(vae, pixels)` asks diffusers' autoencoder for latents; another one where it gives no distribution.
    """

    name: str
    build: Callable[[Path, int], object]
    pipeline_class: str
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance: float = 4.0
    draw: Callable[..., Tensor] = draw_with_guidance
    unpack: Callable[[Tensor, tuple[int, int, int]], Tensor] = first_channels
    clean_latents: Callable[[nn.Module, Tensor], Tensor] = mean_of_the_posterior
